// SPDX-License-Identifier: Apache-2.0
// A custom call of XLA that calls a function of Python: a handler whose one attribute is the function's address. It is given the
// addresses of the operands and then of the results, and returns DONE, or writes a message.
#include <cstring>

#include "xla_ffi.hpp"

namespace {

using namespace xla_ffi;

// The same in normkit/vendors/custom_call.py.
constexpr int64_t MESSAGE = 1024;
constexpr int DONE = 0x600d;
constexpr int64_t MOST_BUFFERS = 6;

typedef int (*Function)(void *const *addresses, char *message);

bool take(const Buffers &buffers, void **addresses) {
    for (int64_t index = 0; index < buffers.count; ++index) {
        if (buffers.types[index] != BUFFER) {
            return false;
        }
        addresses[index] = buffers.buffers[index]->data;
    }
    return true;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Error *normkit_ffi_callback(CallFrame *frame) {
    if (is_metadata_query(frame)) {
        return answer(frame);
    }
    const Attributes &attributes = frame->attributes;
    const Buffers &operands = frame->operands, &results = frame->results;
    void *addresses[MOST_BUFFERS];
    if (frame->struct_size < sizeof(CallFrame) || attributes.count != 1 || attributes.types[0] != ARRAY ||
        attributes.values[0]->dtype != INT64 || attributes.values[0]->count != 1 ||
        operands.count + results.count > MOST_BUFFERS || !take(operands, addresses) ||
        !take(results, addresses + operands.count)) {
        return error(frame, INVALID_ARGUMENT, "normkit's custom call was made by another version of normkit");
    }
    intptr_t address;
    std::memcpy(&address, attributes.values[0]->values, sizeof address);
    char message[MESSAGE] = "the Python function was interrupted";
    IeeeArithmetic arithmetic;
    return reinterpret_cast<Function>(address)(addresses, message) == DONE ? nullptr : error(frame, INTERNAL, message);
}
