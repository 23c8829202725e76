// A mapped safetensors file of a bundle: matrices and vectors by name, where they lie.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "matrix.h"

namespace coreinfer {

struct Json;

class TensorFile {
 public:
  // `name` is said where something is wrong; the mapping must outlive what is taken from it, and begin at a multiple of
  // 64 bytes. Throws std::invalid_argument: the header is damaged, or says of a tensor what cannot be.
  TensorFile(std::string name, const uint8_t* mapping, size_t num_bytes);

  bool has(const std::string& tensor) const { return tensors_.count(tensor) > 0; }
  // A matrix in whichever format it is stored (docs/format.md). Throws std::invalid_argument: it is not there, or of
  // another shape. Unsupported: it is float32.
  Matrix matrix(const std::string& tensor, int rows, int cols) const;
  // A matrix of one row for each neuron, each in one piece (docs/format.md). Throws as above, but never Unsupported.
  Matrix neurons(const std::string& tensor, int num_neurons, int width) const;
  // Null where there is none. Throws std::invalid_argument: it is of another type or size.
  const float* vector(const std::string& tensor, int size) const;
  // Throws std::invalid_argument: they are not there, or of another type or size.
  const int32_t* numbers(const std::string& tensor, int size) const {
    return reinterpret_cast<const int32_t*>(part(tensor, "I32", {size}));
  }
  // However many there are. Throws std::invalid_argument: they are not there, of another type, or no list.
  std::vector<int> list(const std::string& tensor) const;
  // Throws std::invalid_argument: it is not there, or of another type or shape.
  void check(const std::string& tensor, const std::string& dtype, const std::vector<long long>& shape) const {
    part(tensor, dtype, shape);
  }
  const std::string& name() const { return name_; }

 private:
  struct Stored {
    std::string dtype;
    std::vector<long long> shape;
    const uint8_t* data;
  };

  Stored read_entry(const std::string& tensor, const Json& entry, size_t data_start) const;
  const uint8_t* part(const std::string& tensor, const std::string& dtype, const std::vector<long long>& shape) const;

  std::string name_;
  const uint8_t* mapping_;
  size_t num_bytes_;
  std::unordered_map<std::string, Stored> tensors_;
};

}  // namespace coreinfer
