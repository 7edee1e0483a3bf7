// SPDX-License-Identifier: Apache-2.0
// The kernels as custom calls of XLA: handlers whose one attribute is the packed call, with 1 for the pointer of each array
// that there is. Operands and results come in the order of these pointers.
#include <atomic>
#include <cstring>
#include <new>
#include <thread>

#include "arguments.hpp"
#include "xla_ffi.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int normkit_forward(const Forward *);
EXPORTED int normkit_backward(const Backward *);

namespace {

using namespace xla_ffi;

// The number of this thread in the work that it does.
thread_local int worker;

int number_of_worker() { return worker; }

// Work for whichever threads of XLA come before it is done. It stays until the last of them has seen it, long after maybe.
class Shared {
  public:
    Shared(void (*work)(void *), void *data) : work_(work), data_(data) {}

    bool schedule_on(const CallFrame *frame) {
        owners_.fetch_add(1);
        ScheduleArguments arguments{sizeof(ScheduleArguments), nullptr, frame->context, join, this};
        Error *failure = frame->api->schedule(&arguments);
        if (failure) {
            DestroyArguments destroyed{sizeof(DestroyArguments), nullptr, failure};
            frame->api->destroy_error(&destroyed);
            release();
        }
        return !failure;
    }

    void finish() {
        worker = 0;
        work_(data_);
        entered_.fetch_or(CLOSED);
        while (entered_.load() != CLOSED) {
            std::this_thread::yield();
        }
        release();
    }

  private:
    static void join(void *argument) {
        Shared *shared = static_cast<Shared *>(argument);
        if (shared->entered_.fetch_add(1) < CLOSED) {
            IeeeArithmetic arithmetic;
            worker = shared->joined_.fetch_add(1) + 1;
            shared->work_(shared->data_);
        }
        shared->entered_.fetch_sub(1);
        shared->release();
    }

    void release() {
        if (owners_.fetch_sub(1) == 1) {
            delete this;
        }
    }

    static constexpr int64_t CLOSED = int64_t(1) << 32;
    void (*work_)(void *);
    void *data_;
    std::atomic<int64_t> entered_{0}, owners_{1};
    std::atomic<int> joined_{0};
};

thread_local const CallFrame *current;

// Stands for GOMP_parallel: between two pools of threads that wait awake, each takes the processors from the other.
void on_threads_of_xla(void (*work)(void *), void *data, unsigned threads, unsigned) {
    Shared *shared = new (std::nothrow) Shared(work, data);
    if (!shared) {
        worker = 0;
        work(data);
        return;
    }
    while (--threads > 0 && shared->schedule_on(current)) {
    }
    shared->finish();
}

// Put the next buffer's address where a 1 says that there is one; whether the buffers are as many as there should be.
bool fill_in(int64_t *pointers, int64_t count, const Buffers &buffers) {
    int64_t used = 0;
    for (int64_t index = 0; index < count; ++index) {
        if (pointers[index]) {
            if (used == buffers.count || buffers.types[used] != BUFFER) {
                return false;
            }
            pointers[index] = int64_t(reinterpret_cast<intptr_t>(buffers.buffers[used++]->data));
        }
    }
    return used == buffers.count;
}

int64_t elements(const Buffer &buffer) {
    int64_t count = 1;
    for (int64_t index = 0; index < buffer.rank; ++index) {
        count *= buffer.sizes[index];
    }
    return count;
}

template <class Call>
Error *run(const CallFrame *frame, int64_t operands, int64_t results, int (*kernel)(const Call *)) {
    if (is_metadata_query(frame)) {
        return answer(frame);
    }
    constexpr size_t WORDS = sizeof(Call) / sizeof(int64_t);
    const Attributes &attributes = frame->attributes;
    if (frame->struct_size < sizeof(CallFrame) || frame->api->struct_size < sizeof(Api) || attributes.count != 1 ||
        attributes.types[0] != ARRAY || attributes.values[0]->dtype != INT64 || attributes.values[0]->count != WORDS) {
        return error(frame, INVALID_ARGUMENT, "normkit's custom call was made by another version of normkit");
    }
    int64_t words[WORDS];
    std::memcpy(words, attributes.values[0]->values, sizeof words);
    Call call;
    bool filled = fill_in(words, operands, frame->operands) && fill_in(words + operands, results, frame->results);
    std::memcpy(&call, words, sizeof call);
    if (!filled || elements(*frame->operands.buffers[0]) != call.rows * call.hidden) {
        return error(frame, INVALID_ARGUMENT, "normkit's custom call was given other arrays than those it was made for");
    }
    call.openmp = OpenMP{reinterpret_cast<void *>(on_threads_of_xla), reinterpret_cast<void *>(number_of_worker)};
    current = frame;
    IeeeArithmetic arithmetic;
    switch (kernel(&call)) {
        case 0:
            return nullptr;
        case 1:
            return error(frame, RESOURCE_EXHAUSTED, "the CPU kernels could not allocate their scratch memory");
        default:
            return error(frame, FAILED_PRECONDITION, "this processor lacks the instructions that were asked for");
    }
}

}  // namespace

EXPORTED Error *normkit_ffi_forward(CallFrame *frame) { return run<Forward>(frame, 4, 4, normkit_forward); }
EXPORTED Error *normkit_ffi_backward(CallFrame *frame) { return run<Backward>(frame, 6, 4, normkit_backward); }
