// SPDX-License-Identifier: Apache-2.0
// What a custom call on the CPU sees of XLA: the part used here of XLA's FFI interface, whose layout in memory is stable.
// Source of these facts: xla/ffi/api/c_api.h in the folder jax.ffi.include_dir(), which is not there where normkit is compiled.
#pragma once
#include <cfenv>
#include <cstddef>
#include <cstdint>

namespace xla_ffi {

// The oldest version that has all of this; XLA refuses a handler whose version it no longer supports.
constexpr int MAJOR = 0, MINOR = 1;

// struct_size is that of the caller's struct: fields that later versions add come at the end.
struct Extension {
    size_t struct_size;
    int32_t type;
    Extension *next;
};
constexpr int32_t METADATA = 1;

struct Version {
    size_t struct_size;
    Extension *extension;
    int major, minor;
};

struct Metadata {
    size_t struct_size;
    Version version;
    uint32_t traits;
    int64_t state_type;
};

struct MetadataExtension {
    Extension base;
    Metadata *metadata;
};

struct Error;
enum ErrorCode : int32_t { INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, FAILED_PRECONDITION = 9, INTERNAL = 13 };

struct ErrorArguments {
    size_t struct_size;
    Extension *extension;
    const char *message;
    ErrorCode code;
};

struct DestroyArguments {
    size_t struct_size;
    Extension *extension;
    Error *error;
};

struct ScheduleArguments {
    size_t struct_size;
    Extension *extension;
    void *context;
    void (*task)(void *data);
    void *data;
};

// The first of many functions.
struct Api {
    size_t struct_size;
    Extension *extension;
    Version version;
    const void *internal;
    Error *(*create_error)(ErrorArguments *);
    void (*error_message)();
    void (*destroy_error)(DestroyArguments *);
    void (*others[8])();
    // Runs a task on a thread of XLA's, some time; an error where there are none.
    Error *(*schedule)(ScheduleArguments *);
};

struct Buffer {
    size_t struct_size;
    Extension *extension;
    int32_t dtype;
    void *data;
    int64_t rank;
    int64_t *sizes;
};

// Operands, or results; types are all 1, for a Buffer.
struct Buffers {
    size_t struct_size;
    Extension *extension;
    int64_t count;
    int32_t *types;
    Buffer **buffers;
};

struct Array {
    int32_t dtype;
    size_t count;
    const void *values;
};
constexpr int32_t BUFFER = 1, ARRAY = 1, INT64 = 5;

struct Attributes {
    size_t struct_size;
    Extension *extension;
    int64_t count;
    int32_t *types;
    void **names;
    Array **values;
};

struct CallFrame {
    size_t struct_size;
    Extension *extension;
    const Api *api;
    void *context;
    int32_t stage;
    Buffers operands, results;
    Attributes attributes;
};

inline Error *error(const CallFrame *frame, ErrorCode code, const char *message) {
    ErrorArguments arguments{sizeof(ErrorArguments), nullptr, message, code};
    return frame->api->create_error(&arguments);
}

inline bool is_metadata_query(const CallFrame *frame) { return frame->extension && frame->extension->type == METADATA; }

// What a handler says of itself before it is ever called.
inline Error *answer(const CallFrame *frame) {
    Metadata *metadata = reinterpret_cast<MetadataExtension *>(frame->extension)->metadata;
    metadata->version.major = MAJOR;
    metadata->version.minor = MINOR;
    metadata->traits = 0;
    if (metadata->struct_size >= sizeof(Metadata)) {
        metadata->state_type = 0;
    }
    return nullptr;
}

// XLA's threads round subnormal numbers to zero.
class IeeeArithmetic {
  public:
    IeeeArithmetic() {
        std::fegetenv(&before_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~IeeeArithmetic() { std::fesetenv(&before_); }

  private:
    std::fenv_t before_;
};

}  // namespace xla_ffi
