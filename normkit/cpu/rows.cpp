// SPDX-License-Identifier: Apache-2.0
// The rows for one kind of processor: compiled once for each LEVEL, with the instructions that it has.
#include "backward.hpp"
#include "forward_rows.hpp"

extern const Level LEVEL;
const Level LEVEL = {widen, forward_rows, forward_slice, backward_rows, total};
