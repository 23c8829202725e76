// What the Python module holds of the C API: files that Python has mapped, FFNs; and its statuses as exceptions.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "coreinfer_engine.h"
#include "refusals.h"

namespace coreinfer {

namespace py = pybind11;

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Ids = py::array_t<int32_t, py::array::c_style>;

// A status that Python has an exception of its own for.
template <int Status>
struct StatusError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throw what a call of the C API has left.
inline void check(int status) {
  if (status == COREINFER_OK) return;
  const std::string message = coreinfer_last_error();
  switch (status) {
    case COREINFER_ARGUMENT: throw std::invalid_argument(message);
    case COREINFER_UNSUPPORTED: throw Unsupported(message);
    case COREINFER_NO_ROOM: throw StatusError<COREINFER_NO_ROOM>(message);
    case COREINFER_NO_ADDRESS_SPACE: throw StatusError<COREINFER_NO_ADDRESS_SPACE>(message);
    case COREINFER_MEMORY: throw std::bad_alloc();
    default: throw std::runtime_error(message);
  }
}

// A mapped file of a bundle, which Python keeps for as long as the C API reads it.
struct Mapped {
  Mapped(const std::string& name, const Bytes& bytes)
      : file{name.c_str(), bytes.data(), size_t(bytes.size()), let_go, bytes.ptr()} {}

  // After the call that it was given to has succeeded.
  void kept() const { py::handle(static_cast<PyObject*>(file.owner)).inc_ref(); }

  coreinfer_file file;

 private:
  static void let_go(void* array) {
    const py::gil_scoped_acquire acquire;
    py::handle(static_cast<PyObject*>(array)).dec_ref();
  }
};

class FfnHandle {
 public:
  static FfnHandle read(const std::string& record, const std::string& name, const Bytes& mapping,
                        const std::vector<int>& num_neurons) {
    return read_by(coreinfer_read_ffn, record, {name, mapping}, num_neurons);
  }

  // Of a mixture.
  static FfnHandle read_experts(const std::string& record, const std::string& name, const Bytes& mapping,
                                const std::vector<int>& num_neurons) {
    return read_by(coreinfer_read_experts, record, {name, mapping}, num_neurons);
  }

  // A mixture's pack: the same weights, but for experts that are left out.
  FfnHandle keeping(const std::vector<std::vector<int>>& experts) const {
    std::vector<coreinfer_ids> layers;
    for (const std::vector<int>& numbers : experts) layers.push_back({numbers.data(), numbers.size()});
    return made([&](coreinfer_ffn** out) { return coreinfer_keep_experts(get(), layers.data(), layers.size(), out); });
  }

  FfnHandle gather(const std::vector<Ids>& neuron_ids) const {
    std::vector<coreinfer_ids> layers;
    for (const Ids& ids : neuron_ids) layers.push_back({ids.data(), size_t(ids.size())});
    return made(
        [&](coreinfer_ffn** out) { return coreinfer_gather_neurons(get(), layers.data(), layers.size(), out); });
  }

  // The same weights, to be read layer by layer from the file that they lie in.
  FfnHandle in_layers(const std::string& path) const {
    return made([&](coreinfer_ffn** out) { return coreinfer_read_in_layers(get(), path.c_str(), out); });
  }

  int max_neurons() const { return coreinfer_max_neurons(get()); }
  coreinfer_ffn* get() const { return ffn_.get(); }

 private:
  struct Close {
    void operator()(coreinfer_ffn* ffn) const { coreinfer_close_ffn(ffn); }
  };

  static FfnHandle read_by(decltype(coreinfer_read_ffn)* read, const std::string& record, const Mapped& mapped,
                           const std::vector<int>& num_neurons) {
    FfnHandle ffn = made([&](coreinfer_ffn** out) {
      return read(record.c_str(), &mapped.file, num_neurons.data(), num_neurons.size(), out);
    });
    mapped.kept();
    return ffn;
  }

  template <class Make>
  static FfnHandle made(Make make) {
    coreinfer_ffn* ffn = nullptr;
    check(make(&ffn));
    FfnHandle out;
    out.ffn_.reset(ffn);
    return out;
  }

  std::unique_ptr<coreinfer_ffn, Close> ffn_;
};

}  // namespace coreinfer
