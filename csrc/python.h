// What a function needs that Python calls without Torch's dispatcher: Python's limited API (3.11), and DLPack's exchange
// table (1.3), which shows the memory of a tensor. Both are binary interfaces that stay as they are. Declared here because
// neither header is always at hand: Python's is a package of its own, and Torch hides its copy of DLPack's from code that
// keeps to the stable ABI.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <exception>
#include <utility>

// NOTE: weak: nothing links against Python. Whoever calls through it has it in the process.
extern "C" {
struct PyObject;
struct PyMethodDef {
  const char* name;
  PyObject* (*function)(PyObject* self, PyObject* const* arguments, ssize_t count);
  int flags;
  const char* doc;
};

#define FA3_PYTHON extern __attribute__((weak))
FA3_PYTHON PyObject _Py_NoneStruct, _Py_TrueStruct, PyBool_Type, PyFloat_Type, PyLong_Type;
FA3_PYTHON void Py_IncRef(PyObject* object);
FA3_PYTHON void Py_DecRef(PyObject* object);
FA3_PYTHON PyObject* PyCFunction_NewEx(PyMethodDef* method, PyObject* self, PyObject* module);
FA3_PYTHON PyObject* PyObject_Type(PyObject* object);
FA3_PYTHON PyObject* PyObject_Call(PyObject* callable, PyObject* arguments, PyObject* keywords);
FA3_PYTHON int PyType_IsSubtype(PyObject* type, PyObject* base);
FA3_PYTHON PyObject* PyTuple_New(ssize_t size);
FA3_PYTHON int PyTuple_SetItem(PyObject* tuple, ssize_t at, PyObject* given_away);
FA3_PYTHON double PyFloat_AsDouble(PyObject* object);
FA3_PYTHON PyObject* PyLong_FromLongLong(long long value);
FA3_PYTHON long long PyLong_AsLongLong(PyObject* object);
FA3_PYTHON PyObject* PyErr_Occurred();
FA3_PYTHON void PyErr_Clear();
FA3_PYTHON void* PyEval_SaveThread();
FA3_PYTHON void PyEval_RestoreThread(void* state);
#undef FA3_PYTHON
}

namespace python {

constexpr int kFastCall = 0x0080;  // METH_FASTCALL

inline PyObject* none() { return &_Py_NoneStruct; }

// Python could not, and has set an error that says why.
struct Failed : std::exception {};

// A reference that is owned.
class Object {
 public:
  explicit Object(PyObject* owned) : object_(owned) {
    if (owned == nullptr) throw Failed{};
  }
  Object(Object&& other) : object_(other.release()) {}
  ~Object() {
    if (object_ != nullptr) Py_DecRef(object_);
  }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

inline PyObject* new_reference(PyObject* object) {
  Py_IncRef(object);
  return object;
}

// A tuple of new references, each from make(i).
template <class Make>
Object make_tuple(ssize_t size, Make make) {
  Object tuple(PyTuple_New(size));
  for (ssize_t i = 0; i < size; ++i) PyTuple_SetItem(tuple.get(), i, Object(make(i)).release());
  return tuple;
}

// While one lives, Python's other threads run.
class Unlocked {
 public:
  Unlocked() = default;
  Unlocked(const Unlocked&) = delete;
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  void* state_ = PyEval_SaveThread();
};

}  // namespace python

namespace dlpack {

enum DeviceType : int32_t { kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  DeviceType device_type;
  int32_t device;
  int32_t dims;
  TypeCode code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};

// What a type of tensors offers to C code.
struct Exchange {
  uint32_t major_version;
  uint32_t minor_version;
  const Exchange* older;  // of another major version, or nullptr
  void* owning[3];        // functions that we do not call
  int (*view)(void* object, Tensor* borrowed);  // 0, or -1 with an error of Python's set; may be nullptr
  void* current_stream;
};

}  // namespace dlpack
