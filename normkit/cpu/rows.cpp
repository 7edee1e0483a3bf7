// SPDX-License-Identifier: Apache-2.0
// The rows for one kind of processor: compiled once for each LEVEL, with the instructions that it has.
#include "backward.hpp"

extern const Level LEVEL;
const Level LEVEL = {widen, forward_rows, backward_rows, total};
