// SPDX-License-Identifier: Apache-2.0
// Work in items, dealt to threads: those of the caller's OpenMP, or our own.
#pragma once
#include <cstdint>

typedef void (*Work)(const void *context, int64_t item, int64_t worker);

// Run work(context, item, worker) for every item, on at most `threads` threads, of which the caller is one; workers are numbered
// from 0. `gomp_parallel` is GNU OpenMP's function of that name, whose threads are then used, or null.
void run_items(Work work, const void *context, int64_t items, int64_t threads, void *gomp_parallel);
