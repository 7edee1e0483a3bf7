// SPDX-License-Identifier: Apache-2.0
// What is used of Python's C interface: functions that are the same in every CPython from 3.11 on, declared here because its
// headers are often not there where normkit is compiled. They are weak, so that the library also loads where there is no Python.
#pragma once
#include <cstddef>

#define PYTHON extern "C" __attribute__((weak))

struct Object;

// A function of Python, and how it is called.
struct MethodDefinition {
    const char *name;
    Object *(*function)(Object *self, Object *argument);
    int flags;
    const char *documentation;
};
constexpr int ONE_ARGUMENT = 8;

PYTHON Object _Py_NoneStruct;
PYTHON Object _Py_TrueStruct;
PYTHON Object _Py_FalseStruct;
PYTHON void Py_IncRef(Object *);
PYTHON void Py_DecRef(Object *);
PYTHON Object *PyObject_GetAttr(Object *, Object *name);
PYTHON Object *PyObject_Vectorcall(Object *function, Object *const *arguments, size_t count, Object *names);
PYTHON Object *PyTuple_New(ptrdiff_t size);
PYTHON ptrdiff_t PyTuple_Size(Object *);
PYTHON Object *PyTuple_GetItem(Object *, ptrdiff_t);
PYTHON int PyTuple_SetItem(Object *, ptrdiff_t, Object *stolen);
PYTHON void *PyLong_AsVoidPtr(Object *);
PYTHON Object *PyUnicode_InternFromString(const char *);
PYTHON Object *PyCapsule_New(void *, const char *name, void (*destructor)(Object *));
PYTHON void *PyCapsule_GetPointer(Object *, const char *name);
PYTHON Object *PyCFunction_NewEx(MethodDefinition *, Object *self, Object *module);
PYTHON Object *PyErr_Occurred();
PYTHON Object *PyErr_NoMemory();
PYTHON int PyErr_ExceptionMatches(Object *);
PYTHON void PyErr_SetString(Object *, const char *);
PYTHON Object *PyExc_AttributeError;
PYTHON Object *PyExc_MemoryError;
PYTHON void PyErr_Clear();
PYTHON void *PyEval_SaveThread();
PYTHON void PyEval_RestoreThread(void *);

// A reference of our own, given back in the end; null after an error.
class Owned {
  public:
    Owned(Object *object = nullptr) : object_(object) {}
    Owned(const Owned &) = delete;
    Owned &operator=(Owned &&other) {
        Object *before = object_;
        object_ = other.object_;
        other.object_ = before;
        return *this;
    }
    ~Owned() {
        if (object_) {
            Py_DecRef(object_);
        }
    }
    operator Object *() const { return object_; }
    Object *released() {
        Object *object = object_;
        object_ = nullptr;
        return object;
    }

  private:
    Object *object_;
};

static inline Object *with_reference(Object *object) {
    Py_IncRef(object);
    return object;
}

static inline Object *none() { return with_reference(&_Py_NoneStruct); }
