# SPDX-License-Identifier: Apache-2.0
"""`normkit bench`: normkit and its peers on this machine's processor or its NVIDIA GPU, first verified, then timed."""
