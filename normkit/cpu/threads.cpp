// SPDX-License-Identifier: Apache-2.0
#include "threads.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace {

// The items that one thread takes first: the same ones at every call of the same size, which are then still in its caches. Then
// it takes from the others, so that a thread that comes late or is interrupted delays nobody.
struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
};

struct Job {
    Work work;
    const void *context;
    int64_t threads;
    Share *shares;

    void take(int64_t worker) const {
        for (int64_t turn = 0; turn < threads && worker < threads; ++turn) {
            Share &share = shares[(worker + turn) % threads];
            for (int64_t item; (item = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
                work(context, item, worker);
            }
        }
    }
};

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

long process() {
#if defined(__unix__) || defined(__APPLE__)
    return getpid();
#else
    return 0;
#endif
}

// How long a thread waits awake for the next job: the time between two calls of a model's layers.
constexpr auto AWAKE = std::chrono::microseconds(50);
constexpr int64_t CLOSED = int64_t(1) << 32;

class Pool {
  public:
    void run(const Job &job) {
        std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
        if (!only.owns_lock() || process() != process_) {
            job.take(0);
            return;
        }
        grow(job.threads - 1);
        job_ = &job;
        // not set to 0: a thread late for the job before may be counted just now
        entered_.fetch_sub(CLOSED);
        {
            std::lock_guard<std::mutex> guard(mutex_);
            epoch_.fetch_add(1);
        }
        if (asleep_.load() > 0) {
            wake_.notify_all();
        }
        job.take(0);
        entered_.fetch_or(CLOSED);
        while (entered_.load() != CLOSED) {
            relax();
        }
    }

  private:
    void grow(int64_t threads) {
        while (int64_t(threads_.size()) < threads) {
            try {
                threads_.emplace_back([this, worker = int64_t(threads_.size()) + 1, seen = epoch_.load()] { serve(worker, seen); });
            } catch (...) {
                return;
            }
            threads_.back().detach();
        }
    }

    void serve(int64_t worker, int64_t seen) {
        for (;;) {
            seen = wait_after(seen);
            if (entered_.fetch_add(1) < CLOSED) {
                job_.load()->take(worker);
            }
            entered_.fetch_sub(1);
        }
    }

    int64_t wait_after(int64_t seen) {
        auto until = std::chrono::steady_clock::now() + AWAKE;
        do {
            for (int turn = 0; turn < 64; ++turn, relax()) {
                if (epoch_.load(std::memory_order_acquire) != seen) {
                    return epoch_.load();
                }
            }
        } while (std::chrono::steady_clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        asleep_.fetch_sub(1);
        return epoch_.load();
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
    std::atomic<const Job *> job_{nullptr};
    std::atomic<int64_t> epoch_{0}, entered_{CLOSED}, asleep_{0};
    long process_ = process();
};

// Never destroyed: threads that wait when the process ends use it to the last. A child process makes its own.
Pool *pool() {
    static std::mutex mutex;
    static std::atomic<Pool *> current{nullptr};
    static std::atomic<long> owner{0};
    if (owner.load() != process()) {
        std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
        if (lock.owns_lock() && owner.load() != process()) {
            current.store(new (std::nothrow) Pool);
            owner.store(process());
        }
    }
    return current.load();
}

// What GNU OpenMP runs in every thread of its team.
struct Team {
    const Job &job;
    int (*number)();
};

void take_in_team(void *team) {
    auto &own = *static_cast<const Team *>(team);
    own.job.take(own.number());
}

}  // namespace

void run_items(Work work, const void *context, int64_t items, int64_t threads, const OpenMP &openmp) {
    threads = threads < items ? threads : items;
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    if (threads <= 1) {
        for (int64_t item = 0; item < items; ++item) {
            work(context, item, 0);
        }
        return;
    }
    Share shares[MOST_THREADS];
    for (int64_t worker = 0; worker < threads; ++worker) {
        shares[worker].next.store(items * worker / threads, std::memory_order_relaxed);
        shares[worker].end = items * (worker + 1) / threads;
    }
    Job job{work, context, threads, shares};
    if (openmp.parallel && openmp.thread_number) {
        typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
        Team team{job, reinterpret_cast<int (*)()>(openmp.thread_number)};
        reinterpret_cast<Parallel>(openmp.parallel)(take_in_team, &team, unsigned(threads), 0);
    } else if (Pool *own = pool()) {
        own->run(job);
    } else {
        job.take(0);
    }
}
