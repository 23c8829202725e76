// From Python's tuples and arrays to weights in place; what does not fit is refused here.
#include "reading.h"

#include "refusals.h"

namespace coreinfer {

namespace {

const void* bytes_of(const py::handle& array, size_t num_bytes, const std::string& what, Owners& owners) {
  const py::array values = py::cast<py::array>(array);
  if (!(values.flags() & py::array::c_style)) refuse(what, "a contiguous array", "another");
  if (size_t(values.nbytes()) != num_bytes)
    refuse(what, std::to_string(num_bytes) + " bytes", std::to_string(values.nbytes()));
  owners.push_back(values);
  return values.data();
}

}  // namespace

Matrix read_matrix(const py::handle& object, const std::string& what, Owners& owners) {
  const py::tuple parts = py::cast<py::tuple>(object);
  const std::string format = py::cast<std::string>(parts[0]);
  Matrix w;
  w.rows = py::cast<int>(parts[1]);
  w.cols = py::cast<int>(parts[2]);
  if (w.rows < 1 || w.cols < 1)
    refuse(what, "rows and columns", std::to_string(w.rows) + " x " + std::to_string(w.cols));
  if (format == "bf16") {
    w.bf16 = static_cast<const uint16_t*>(bytes_of(parts[3], w.num_bytes(), what, owners));
    return w;
  }
  if (format != "int8" && format != "int4" && format != "int8-planes")
    refuse(what, "bf16, int8, int8-planes or int4", format);
  w.format = format == "int8" ? Format::int8 : format == "int4" ? Format::int4 : Format::int8_planes;
  const size_t tiles = size_t(w.num_blocks()) * w.num_groups();
  w.codes = static_cast<const uint8_t*>(bytes_of(parts[3], tiles * w.tile_bytes(), what, owners));
  w.scales = static_cast<const uint16_t*>(bytes_of(parts[4], tiles * kBlockRows * 2, what + " scales", owners));
  if (w.format == Format::int4)
    w.zeros = static_cast<const uint8_t*>(bytes_of(parts[5], tiles * kBlockRows, what + " zeros", owners));
  if (w.format == Format::int8_planes)
    w.lows = static_cast<const uint8_t*>(bytes_of(parts[5], tiles * w.tile_bytes(), what + " low halves", owners));
  return w;
}

}  // namespace coreinfer
