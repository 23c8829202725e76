#include "tensor_file.h"

#include <cstring>

#include "json.h"
#include "refusals.h"

namespace coreinfer {
namespace {

constexpr uint64_t kMostHeaderBytes = 100 << 20;
constexpr size_t kMostDimensions = 8;
constexpr long long kMostValues = 1LL << 52;
const std::string kFiller = "__filler__";

int item_bytes(const std::string& dtype) {
  for (const auto& [name, size] : {std::pair{"F32", 4}, {"I32", 4}, {"BF16", 2}, {"F16", 2}, {"I8", 1}, {"U8", 1}})
    if (dtype == name) return size;
  return 0;
}

std::string shown(const std::string& dtype, const std::vector<long long>& shape) {
  std::string text = dtype + " [";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

TensorFile::TensorFile(std::string name, const uint8_t* mapping, size_t num_bytes)
    : name_(std::move(name)), mapping_(mapping), num_bytes_(num_bytes) {
  uint64_t header_bytes = 0;
  if (num_bytes < 8) refuse(name_, "a safetensors file", std::to_string(num_bytes) + " bytes");
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | mapping[i];
  if (header_bytes > std::min<uint64_t>(kMostHeaderBytes, num_bytes - 8))
    refuse(name_, "a header within the file", "one of " + std::to_string(header_bytes) + " bytes");
  try {
    const Json header = Json::parse({reinterpret_cast<const char*>(mapping) + 8, size_t(header_bytes)});
    for (size_t i = 0; i < header.keys.size(); ++i) {
      const std::string& tensor = header.keys[i];
      if (tensor == "__metadata__" || tensor.compare(0, kFiller.size(), kFiller) == 0) continue;
      tensors_.emplace(tensor, read_entry(tensor, header.items[i], 8 + header_bytes));
    }
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(name_ + ": header: " + error.what());
  }
}

TensorFile::Stored TensorFile::read_entry(const std::string& tensor, const Json& entry, size_t data_start) const {
  Stored stored;
  stored.dtype = entry.string("dtype");
  const int size = item_bytes(stored.dtype);
  if (size == 0) refuse(tensor, "F32, I32, BF16, F16, I8 or U8", stored.dtype);
  long long count = 1;
  for (const Json& extent : entry.array("shape")) {
    stored.shape.push_back(extent.as_size(tensor + " shape"));
    if (stored.shape.back() > 0 && count > kMostValues / stored.shape.back()) refuse(tensor, "fewer values", "more");
    count *= stored.shape.back();
  }
  const std::vector<Json>& offsets = entry.array("data_offsets");
  if (offsets.size() != 2 || stored.shape.size() > kMostDimensions) refuse(tensor, "two offsets, a shape", "others");
  const long long begin = offsets[0].as_size(tensor), end = offsets[1].as_size(tensor);
  const auto data_bytes = static_cast<long long>(num_bytes_ - data_start);
  if (begin > end || end > data_bytes || end - begin != count * size)
    refuse(tensor, std::to_string(count * size) + " bytes of " + std::to_string(data_bytes),
           std::to_string(begin) + " to " + std::to_string(end));
  stored.data = mapping_ + data_start + begin;
  if ((data_start + begin) % size) refuse(tensor, "a place at a multiple of " + std::to_string(size), "another");
  return stored;
}

const uint8_t* TensorFile::part(const std::string& tensor, const std::string& dtype,
                                const std::vector<long long>& shape) const {
  const auto found = tensors_.find(tensor);
  if (found == tensors_.end()) throw std::invalid_argument(name_ + ": tensor '" + tensor + "' is missing");
  const Stored& stored = found->second;
  if (stored.dtype != dtype || stored.shape != shape)
    refuse(name_ + ": tensor '" + tensor + "'", shown(dtype, shape), shown(stored.dtype, stored.shape));
  return stored.data;
}

Matrix TensorFile::matrix(const std::string& tensor, int rows, int cols) const {
  const auto halves = [](const uint8_t* data) { return reinterpret_cast<const uint16_t*>(data); };
  Matrix w;
  w.rows = rows;
  w.cols = cols;
  const auto tiles = [&](long long size) { return std::vector<long long>{w.num_blocks(), w.num_groups(), size}; };
  if (const auto plain = tensors_.find(tensor); plain != tensors_.end() && plain->second.dtype == "F32")
    throw Unsupported(name_ + ": tensor '" + tensor +
                      "' is F32; the native engine reads bf16, int8, int8-planes and int4 matrices");
  if (has(tensor + ".q4")) {
    w.format = Format::int4;
    w.codes = part(tensor + ".q4", "U8", tiles(256));
    w.zeros = part(tensor + ".zero", "U8", tiles(kBlockRows));
  } else if (has(tensor + ".high")) {
    w.format = Format::int8_planes;
    w.codes = part(tensor + ".high", "U8", tiles(256));
    w.lows = part(tensor + ".low", "U8", tiles(256));
  } else if (has(tensor + ".q8")) {
    w.format = Format::int8;
    w.codes = part(tensor + ".q8", "U8", tiles(512));
  } else {
    w.bf16 = halves(part(tensor, "BF16", {rows, cols}));
    return w;
  }
  w.scales = halves(part(tensor + ".scale", "F16", tiles(kBlockRows)));
  return w;
}

Matrix TensorFile::neurons(const std::string& tensor, int num_neurons, int width) const {
  Matrix w;
  w.format = Format::int4_rows;
  w.rows = num_neurons;
  w.cols = width;
  w.codes = part(tensor, "U8", {num_neurons, w.num_parts(), kPartBytes});
  return w;
}

std::vector<int> TensorFile::list(const std::string& tensor) const {
  const auto found = tensors_.find(tensor);
  const bool is_list = found != tensors_.end() && found->second.shape.size() == 1 && found->second.shape[0] < 1 << 30;
  const int size = is_list ? static_cast<int>(found->second.shape[0]) : 0;
  const int32_t* stored = numbers(tensor, size);
  return {stored, stored + size};
}

const float* TensorFile::vector(const std::string& tensor, int size) const {
  return has(tensor) ? reinterpret_cast<const float*>(part(tensor, "F32", {size})) : nullptr;
}

}  // namespace coreinfer
