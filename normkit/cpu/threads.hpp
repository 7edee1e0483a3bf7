// SPDX-License-Identifier: Apache-2.0
// Work in items, dealt to threads: those of the caller's OpenMP, or our own.
#pragma once
#include <cstdint>

#include "arguments.hpp"

typedef void (*Work)(const void *context, int64_t item, int64_t worker);

constexpr int64_t MOST_THREADS = 256;

// Run work(context, item, worker) for every item, on at most `threads` threads, of which the caller is one; workers are numbered
// from 0. The threads are those of GNU OpenMP, where its functions are given, or our own.
void run_items(Work work, const void *context, int64_t items, int64_t threads, const OpenMP &openmp);
