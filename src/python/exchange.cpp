// SPDX-License-Identifier: MIT
#include "exchange.hpp"

#include <bit>
#include <memory>
#include <string>

#include "mscclpp_ep/dlpack.hpp"
#include "mscclpp_ep/error.hpp"

namespace mscclpp_ep::python {

namespace {

// As DLPack 1.x lays them out.

constexpr std::uint32_t kMajorVersion = 1;
constexpr std::int32_t kCpu = 1;
constexpr std::int32_t kCuda = 2;

struct DlVersion {
  std::uint32_t major;
  std::uint32_t minor;
};

struct DlDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DlType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t ndim;
  DlType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DlManagedTensor {
  DlVersion version;
  void* manager;
  void (*deleter)(DlManagedTensor*);
  std::uint64_t flags;
  DlTensor tensor;
};

}  // namespace

struct ExchangeTable {
  DlVersion version;
  const ExchangeTable* older;
  void* allocate;
  void* exportManaged;
  int (*import)(DlManagedTensor* tensor, void** object);
  int (*borrow)(void* object, DlTensor* tensor);
  int (*currentStream)(std::int32_t deviceType, std::int32_t deviceId, void** stream);
};

namespace {

/// What a framework is given: a tensor of DLPack, and what it refers to.
struct Exported {
  explicit Exported(const Tensor& given)
      : owner(given.owner), shape(given.view.shape), strides(given.view.strides) {
    const TensorView& view = given.view;
    managed.version = {kMajorVersion, 0};
    managed.manager = this;
    managed.deleter = [](DlManagedTensor* self) { delete static_cast<Exported*>(self->manager); };
    managed.tensor.data = view.data;
    managed.tensor.device = {view.device.type == DeviceType::cuda ? kCuda : kCpu,
                             view.device.index};
    managed.tensor.ndim = view.ndim;
    managed.tensor.dtype = {static_cast<std::uint8_t>(dlpackCode(view.dtype)),
                            static_cast<std::uint8_t>(itemSize(view.dtype) * 8), 1};
    managed.tensor.shape = shape.data();
    managed.tensor.strides = strides.data();
  }

  std::shared_ptr<void> owner;
  decltype(TensorView::shape) shape;
  decltype(TensorView::strides) strides;
  DlManagedTensor managed{};
};

void check(int result) {
  if (result != 0) throw nb::python_error();
}

}  // namespace

Exchange::Exchange(nb::handle type) {
  PyObject* capsule = PyObject_GetAttrString(type.ptr(), "__dlpack_c_exchange_api__");
  if (capsule != nullptr) {
    // The type keeps it.
    table_ =
        static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
  }
  // A type that has none has the methods of Python, or is refused where these are looked for.
  if (table_ == nullptr) PyErr_Clear();
  while (table_ != nullptr && table_->version.major != kMajorVersion) table_ = table_->older;
  if (table_ != nullptr && table_->borrow == nullptr) table_ = nullptr;
}

TensorView Exchange::view(nb::handle tensor) const {
  DlTensor borrowed{};
  try {
    check(table_->borrow(tensor.ptr(), &borrowed));
  } catch (nb::python_error& error) {
    const std::string reason = nb::str(error.value()).c_str();
    // What follows on more lines is where in the framework it was raised.
    throw InvalidArgument(
        std::string("a ") + nb::type_name(tensor.type()).c_str() +
        " was given that DLPack cannot describe: " + reason.substr(0, reason.find('\n')));
  }
  return fromDlpack(borrowed);
}

nb::object Exchange::make(const Tensor& tensor) const {
  auto exported = std::make_unique<Exported>(tensor);
  void* object = nullptr;
  // It is the framework's now, whatever comes of it.
  check(table_->import(&exported.release()->managed, &object));
  return nb::steal(static_cast<PyObject*>(object));
}

std::uintptr_t Exchange::currentStream(int gpu) const {
  void* stream = nullptr;
  check(table_->currentStream(kCuda, gpu, &stream));
  return std::bit_cast<std::uintptr_t>(stream);
}

}  // namespace mscclpp_ep::python
