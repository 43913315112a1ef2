#include "watch.h"

#include <cstdint>

namespace gossamer {
namespace {

// Names that are looked up, made once.
struct Names {
    PyObject* forward = PyUnicode_InternFromString("forward");
    PyObject* hooks = PyUnicode_InternFromString("_forward_hooks");
    PyObject* pre_hooks = PyUnicode_InternFromString("_forward_pre_hooks");
    PyObject* modules = PyUnicode_InternFromString("_modules");
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* version = PyUnicode_InternFromString("_version");
};

// A reference that is given back.
class Own {
public:
    explicit Own(PyObject* object) : object_(object) {}
    ~Own() { Py_XDECREF(object_); }
    Own(const Own&) = delete;
    Own& operator=(const Own&) = delete;
    PyObject* get() const { return object_; }
    explicit operator bool() const { return object_ != nullptr; }

private:
    PyObject* object_;
};

// Facts and numbers from front to back. Borrowed references.
class Reader {
public:
    Reader(PyObject* facts, PyObject* numbers)
        : facts_(facts), numbers_(reinterpret_cast<const std::int64_t*>(PyBytes_AsString(numbers))) {}
    PyObject* fact() { return PyTuple_GetItem(facts_, place_++); }
    std::int64_t number() { return *numbers_++; }

private:
    PyObject* facts_;
    Py_ssize_t place_ = 0;
    const std::int64_t* numbers_;
};

// Addresses may be stale: asking for a line reads nothing.
void fetch(PyObject* lines) {
    const auto* address = reinterpret_cast<const std::uint64_t*>(PyBytes_AsString(lines));
    const Py_ssize_t count = PyBytes_Size(lines) / static_cast<Py_ssize_t>(sizeof(*address));
    for (Py_ssize_t i = 0; i < count; ++i) {
#if defined(__GNUC__)
        __builtin_prefetch(reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address[i])));
#endif
    }
}

bool filled(PyObject* own, PyObject* name, bool& any) {
    PyObject* held = PyDict_GetItem(own, name);
    if (held == nullptr) return false;
    any = any || PyDict_Size(held) > 0;
    return true;
}

// type, forward, whether there are hooks, children
bool module_same(Reader& read, const Names& names) {
    PyObject* module = read.fact();
    PyObject* own = read.fact();
    PyObject* kind = read.fact();
    PyObject* forward = read.fact();
    const bool hooked = read.number() != 0;
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return false;
    PyObject* found = PyDict_GetItem(own, names.forward);
    if ((found == nullptr ? Py_None : found) != forward) return false;
    bool any = false;
    if (!filled(own, names.hooks, any) || !filled(own, names.pre_hooks, any) || any != hooked) return false;
    PyObject* held = PyDict_GetItem(own, names.modules);
    const std::int64_t children = read.number();
    if (held == nullptr || PyDict_Size(held) != children) return false;
    for (std::int64_t i = 0; i < children; ++i) {
        PyObject* name = read.fact();
        PyObject* child = read.fact();
        if (PyDict_GetItem(held, name) != child) return false;
    }
    return true;
}

bool number_is(PyObject* number, std::int64_t wanted) {
    return number != nullptr && static_cast<std::int64_t>(PyLong_AsUnsignedLongLongMask(number)) == wanted;
}

// What DLPack calls a tensor (its ABI, version 1).
struct View {
    void* data;
    std::int32_t device, device_index, dims;
    std::uint8_t code, bits;
    std::uint16_t lanes;
    std::int64_t *shape, *strides;
    std::uint64_t offset;
};

struct Exchange {
    std::uint32_t major, minor;
    void* older;
    void *allocate, *owning, *made;
    int (*look)(void* tensor, View* out);  // since 1.3; a torch without it is asked attribute by attribute
    void* stream;
};

const Exchange* exchange_of(PyObject* tensor) {
    const Own kind(PyObject_Type(tensor));
    const Own held(PyObject_GetAttrString(kind.get(), "__dlpack_c_exchange_api__"));
    const auto* found = held ? static_cast<const Exchange*>(PyCapsule_GetPointer(held.get(), "dlpack_exchange_api")) : nullptr;
    if (PyErr_Occurred()) PyErr_Clear();
    return found != nullptr && found->major == 1 && found->minor >= 3 ? found : nullptr;
}

// The view's numbers, one after the other, as long as `each` wants more.
template <class Each>
bool numbers_of(const View& view, Each each) {
    const std::int64_t kind = (view.code << 8 | view.bits) << 16 | view.lanes;
    const std::int64_t device = static_cast<std::int64_t>(view.device) << 32 | view.device_index;
    if (!each(reinterpret_cast<std::intptr_t>(view.data) + static_cast<std::int64_t>(view.offset)) || !each(kind) ||
        !each(device) || !each(view.dims)) {
        return false;
    }
    for (std::int32_t i = 0; i < view.dims; ++i) {
        if (!each(view.shape[i]) || !each(view.strides[i])) return false;
    }
    return true;
}

bool view_same(PyObject* tensor, Reader& read) {
    const auto* exchange = reinterpret_cast<const Exchange*>(static_cast<std::intptr_t>(read.number()));
    View view{};
    return exchange->look(tensor, &view) == 0 &&
           numbers_of(view, [&](std::int64_t number) { return read.number() == number; });
}

bool attributes_same(PyObject* tensor, Reader& read, const Names& names) {
    PyObject* shape = read.fact();
    PyObject* strides = read.fact();
    PyObject* dtype = read.fact();
    const std::int64_t place = read.number();
    const Own own_place(PyObject_CallMethodObjArgs(tensor, names.data_ptr, nullptr));
    if (!number_is(own_place.get(), place)) return false;
    const Own own_shape(PyObject_GetAttr(tensor, names.shape));
    if (!own_shape || PyObject_RichCompareBool(own_shape.get(), shape, Py_EQ) != 1) return false;
    const Own own_strides(PyObject_CallMethodObjArgs(tensor, names.stride, nullptr));
    if (!own_strides || PyObject_RichCompareBool(own_strides.get(), strides, Py_EQ) != 1) return false;
    const Own own_dtype(PyObject_GetAttr(tensor, names.dtype));
    return own_dtype.get() == dtype;
}

// weak reference; version (-1: none is kept), whether a view follows, and that or the attributes
bool tensor_same(PyObject* tensor, Reader& read, const Names& names) {
    PyObject* known = read.fact();
    const std::int64_t version = read.number();
    const Own alive(PyObject_CallObject(known, nullptr));
    if (alive.get() != tensor) return false;
    if (read.number() != 0 ? !view_same(tensor, read) : !attributes_same(tensor, read, names)) return false;
    if (version < 0) return true;
    const Own own_version(PyObject_GetAttr(tensor, names.version));
    return number_is(own_version.get(), version);
}

// The tensors of one dictionary of a module, None among them, in its order.
bool tensors_same(Reader& read, const Names& names) {
    PyObject* held = read.fact();
    const std::int64_t count = read.number();
    if (PyDict_Size(held) != count) return false;
    Py_ssize_t place = 0;
    PyObject *name = nullptr, *tensor = nullptr;
    for (std::int64_t i = 0; i < count; ++i) {
        if (!PyDict_Next(held, &place, &name, &tensor)) return false;
        if (read.fact() != name) return false;
        const bool none = read.number() != 0;
        if (none != (tensor == Py_None)) return false;
        if (!none && !tensor_same(tensor, read, names)) return false;
    }
    return true;
}

bool constant_same(Reader& read) {
    PyObject* own = read.fact();
    PyObject* name = read.fact();
    PyObject* value = read.fact();
    PyObject* found = PyDict_GetItem(own, name);
    return found != nullptr && PyObject_RichCompareBool(found, value, Py_EQ) == 1;
}

bool all_same(Reader& read, const Names& names) {
    for (std::int64_t left = read.number(); left > 0; --left) {
        if (!module_same(read, names)) return false;
    }
    for (std::int64_t left = read.number(); left > 0; --left) {
        if (!constant_same(read)) return false;
    }
    for (std::int64_t left = read.number(); left > 0; --left) {
        if (!tensors_same(read, names)) return false;
    }
    return true;
}

}  // namespace

std::vector<std::int64_t> watch_view(PyObject* tensor) {
    std::vector<std::int64_t> found;
    const Exchange* exchange = exchange_of(tensor);
    View view{};
    if (exchange != nullptr && exchange->look(tensor, &view) == 0) {
        found.push_back(reinterpret_cast<std::intptr_t>(exchange));
        numbers_of(view, [&](std::int64_t number) { found.push_back(number); return true; });
    }
    if (PyErr_Occurred()) PyErr_Clear();
    return found;
}

bool watch_same(PyObject* facts, PyObject* numbers, PyObject* lines) {
    static const Names names;
    fetch(lines);
    Reader read(facts, numbers);
    const bool same = all_same(read, names);
    if (PyErr_Occurred()) PyErr_Clear();
    return same;
}

}  // namespace gossamer
