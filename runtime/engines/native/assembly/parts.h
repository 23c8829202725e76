// What assembly has at hand for each part of a model.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "assembly.h"
#include "families.h"

namespace coreinfer {

// What the parts of a model are put together from.
struct Parts {
  const ModelRecord& record;
  const Family& family;
  const Settings& settings;
  const TensorFile& base;
  Memory& memory;

  Linear linear(const std::string& path, int rows, int cols) const {
    return {base.matrix(path + ".weight", rows, cols), base.vector(path + ".bias", rows)};
  }

  // One that must be there.
  const float* vector(const std::string& name, int size) const {
    const float* values = base.vector(name, size);
    if (!values) throw std::invalid_argument(base.name() + ": tensor '" + name + "' is missing");
    return values;
  }

  // `divisor`: of what comes out.
  Norm norm(const std::string& path, int size, float divisor = 1.0f) const {
    return {changed(vector(path + ".weight", size), size, family.norm_offset, divisor),
            changed(base.vector(path + ".bias", size), size, 0.0f, divisor)};
  }

  const float* ones(int size) const { return keep(std::vector<float>(size, 1.0f)); }

  // Values that live as long as the model.
  const float* keep(std::vector<float> values) const {
    memory.push_back(std::make_shared<const std::vector<float>>(std::move(values)));
    return memory.back()->data();
  }

 private:
  // (values + offset) / divisor
  const float* changed(const float* values, int size, float offset, float divisor) const {
    if (!values || (offset == 0.0f && divisor == 1.0f)) return values;
    std::vector<float> copy(values, values + size);
    for (float& value : copy) value = (value + offset) / divisor;
    return keep(std::move(copy));
  }
};

}  // namespace coreinfer
