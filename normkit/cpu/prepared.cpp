// SPDX-License-Identifier: Apache-2.0
// A call of PyTorch like one before, from its tensors to its results: what normkit/prepared.py does, at less cost.
#include <cstring>
#include <initializer_list>
#include <new>

#include "arguments.hpp"
#include "python.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int normkit_forward(const Forward *);
EXPORTED int normkit_backward(const Backward *);

namespace {

constexpr int GIVEN = 6, RESULTS = 4, POINTERS_AT_MOST = 10, PAIRS_AT_MOST = 9;

// As normkit/cpu/prepared.py packs it; normkit/interface.py explains the fields.
struct Layout {
    int64_t backward;                                      // whether it is the backward pass
    int64_t present;                                       // bit n: whether tensor n is given
    int64_t results[RESULTS], pointers[POINTERS_AT_MOST];  // from 1 among the tensors given and those made, or 0
    int64_t written, releases;  // bit n: whether tensor n is counted as written; whether other threads may run
    int64_t pairs;  // of tensors given, numbered as above
    struct {
        int64_t one, size, other, other_size;
    } pair[PAIRS_AT_MOST];
};

struct Prepared {
    Layout layout;
    union {
        Forward forward;
        Backward backward;
    };
    Object *fits, *address_of, *count_as_written, *make, *problem, *is_nested;
};

constexpr const char *NAME = "normkit.prepared";

void destroy(Object *capsule) {
    auto ready = static_cast<Prepared *>(PyCapsule_GetPointer(capsule, NAME));
    for (Object *object : {ready->fits, ready->address_of, ready->count_as_written, ready->make, ready->problem, ready->is_nested}) {
        Py_DecRef(object);
    }
    delete ready;
}

enum class Answer { YES, NO, ERROR };

// What `run` returns instead of results.
Object *instead(Answer answer) { return answer == Answer::NO ? none() : nullptr; }

// The tensors of a call, and where they are; the first is none.
struct Arrays {
    Object *array[1 + GIVEN + RESULTS] = {&_Py_NoneStruct};
    void *address[1 + GIVEN + RESULTS] = {};
    int count = 1;

    // Whether the tensor has memory; to the kernels, address 0 is an array that there is not.
    Answer add(const Prepared &ready, Object *tensor) {
        array[count] = tensor;
        Owned number(PyObject_Vectorcall(ready.address_of, &tensor, 1, nullptr));
        if (!number) {
            return Answer::ERROR;
        }
        void *found = PyLong_AsVoidPtr(number);
        address[count++] = found;
        return found ? Answer::YES : PyErr_Occurred() ? Answer::ERROR : Answer::NO;
    }
};

// Whether the tensors are like those of the call that was prepared. Those given are put together.
Answer is_alike(const Prepared &ready, Object *tensors, Object **given, int &count) {
    for (int place = 0; place < GIVEN; ++place) {
        Object *tensor = PyTuple_GetItem(tensors, place);
        bool is_given = tensor != &_Py_NoneStruct;
        if (is_given != bool(ready.layout.present >> place & 1)) {
            return Answer::NO;
        }
        if (is_given) {
            // a nested tensor has no strides, and to look for them the guard would end the process
            Owned nested(PyObject_GetAttr(tensor, ready.is_nested));
            if (!nested && !PyErr_ExceptionMatches(PyExc_AttributeError)) {
                return Answer::ERROR;
            }
            if (nested != &_Py_FalseStruct) {
                PyErr_Clear();
                return Answer::NO;
            }
            given[count++] = tensor;
        }
    }
    Owned alike(PyObject_Vectorcall(ready.fits, given, count, nullptr));
    return !alike ? Answer::ERROR : alike == &_Py_TrueStruct ? Answer::YES : Answer::NO;
}

bool overlap(const Layout &layout, void *const *address) {
    for (int64_t index = 0; index < layout.pairs; ++index) {
        auto &pair = layout.pair[index];
        auto one = static_cast<char *>(address[pair.one]), other = static_cast<char *>(address[pair.other]);
        if (one < other + pair.other_size && other < one + pair.size) {
            return true;
        }
    }
    return false;
}

template <class Call>
int compute(int (*kernels)(const Call *), Call call, int count, const Layout &layout, void *const *pointers) {
    std::memcpy(static_cast<void *>(&call), pointers, count * sizeof *pointers);
    if (!layout.releases) {
        return kernels(&call);
    }
    void *thread = PyEval_SaveThread();
    int status = kernels(&call);
    PyEval_RestoreThread(thread);
    return status;
}

int compute(const Prepared &ready, void *const *pointers) {
    return ready.layout.backward ? compute(normkit_backward, ready.backward, 10, ready.layout, pointers)
                                 : compute(normkit_forward, ready.forward, 8, ready.layout, pointers);
}

bool count_as_written(const Prepared &ready, Object *tensors) {
    if (!ready.layout.written) {
        return true;
    }
    Object *written[GIVEN];
    int count = 0;
    for (int place = 0; place < GIVEN; ++place) {
        if (ready.layout.written >> place & 1) {
            written[count++] = PyTuple_GetItem(tensors, place);
        }
    }
    Owned all(PyTuple_New(count));
    for (int index = 0; all && index < count; ++index) {
        PyTuple_SetItem(all, index, with_reference(written[index]));
    }
    Object *argument = all;
    return all && Owned(PyObject_Vectorcall(ready.count_as_written, &argument, 1, nullptr));
}

// The results and the problem; None if the tensors are not alike, have no memory, or would be written to in two places.
Object *run(Object *self, Object *tensors) {
    const Prepared &ready = *static_cast<Prepared *>(PyCapsule_GetPointer(self, NAME));
    Object *given[GIVEN];
    int count = 0;
    Answer answer = is_alike(ready, tensors, given, count);
    Arrays arrays;
    for (int index = 0; answer == Answer::YES && index < count; ++index) {
        answer = arrays.add(ready, given[index]);
    }
    if (answer == Answer::YES && overlap(ready.layout, arrays.address)) {
        answer = Answer::NO;
    }
    if (answer != Answer::YES) {
        return instead(answer);
    }
    Owned made[RESULTS];
    for (int index = 0; index < PyTuple_Size(ready.make); ++index) {
        made[index] = Owned(PyObject_Vectorcall(PyTuple_GetItem(ready.make, index), nullptr, 0, nullptr));
        answer = made[index] ? arrays.add(ready, made[index]) : Answer::ERROR;
        if (answer != Answer::YES) {
            return instead(answer);
        }
    }
    void *pointers[POINTERS_AT_MOST];
    for (int index = 0; index < POINTERS_AT_MOST; ++index) {
        pointers[index] = arrays.address[ready.layout.pointers[index]];
    }
    if (compute(ready, pointers)) {
        PyErr_SetString(PyExc_MemoryError, "the CPU kernels could not allocate their scratch memory");
        return nullptr;
    }
    Owned results(count_as_written(ready, tensors) ? PyTuple_New(RESULTS + 1) : nullptr);
    for (int index = 0; results && index < RESULTS; ++index) {
        PyTuple_SetItem(results, index, with_reference(arrays.array[ready.layout.results[index]]));
    }
    if (results) {
        PyTuple_SetItem(results, RESULTS, with_reference(ready.problem));
    }
    return results.released();
}

MethodDefinition definition = {"prepared", run, ONE_ARGUMENT, nullptr};

}  // namespace

// Whether there is a Python with what is used here.
EXPORTED int normkit_has_python() { return &_Py_NoneStruct && Py_IncRef && PyObject_Vectorcall && PyCFunction_NewEx; }

// Return a function of six tensors, some of which may be None.
EXPORTED Object *normkit_prepare(
    const char *layout, const char *call, Object *fits, Object *address_of, Object *count_as_written, Object *make, Object *problem) {
    auto ready = new (std::nothrow) Prepared;
    if (!ready) {
        return PyErr_NoMemory();
    }
    std::memcpy(&ready->layout, layout, sizeof ready->layout);
    std::memcpy(&ready->backward, call, ready->layout.backward ? sizeof ready->backward : sizeof ready->forward);
    ready->fits = with_reference(fits);
    ready->address_of = with_reference(address_of);
    ready->count_as_written = with_reference(count_as_written);
    ready->make = with_reference(make);
    ready->problem = with_reference(problem);
    ready->is_nested = PyUnicode_InternFromString("is_nested");
    Owned capsule(PyCapsule_New(ready, NAME, destroy));
    return capsule ? PyCFunction_NewEx(&definition, capsule, nullptr) : nullptr;
}
