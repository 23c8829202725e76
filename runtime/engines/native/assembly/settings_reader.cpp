#include "settings_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "refusals.h"

namespace coreinfer {

const Json* find_setting(const ModelRecord& record, const Family& family, const char* key) {
  const auto same = [key](const char* name) { return std::strcmp(name, key) == 0; };
  return std::any_of(family.settings.begin(), family.settings.end(), same) ? record.config.find(key) : nullptr;
}

bool is_given(const ModelRecord& record, const Family& family, const char* key) {
  return Json::is_given(find_setting(record, family, key));
}

double SettingsReader::factor(const char* key, double otherwise) const {
  const double value = has(key) ? record_.config.real(key) : otherwise;
  if (!(std::isfinite(value) && value != 0.0)) refuse(key, "a number other than 0", std::to_string(value));
  return value;
}

int SettingsReader::size(const char* key, int least, int most) const {
  const int value = integer(key, 0);
  if (value < least || value > most)
    refuse(key, std::to_string(least) + " to " + std::to_string(most), std::to_string(value));
  return value;
}

const std::vector<Json>& SettingsReader::per_layer(const char* key) const {
  const std::vector<Json>& values = record_.config.array(key);
  if (values.size() != static_cast<size_t>(record_.num_layers))
    refuse(key, std::to_string(record_.num_layers) + " layers", std::to_string(values.size()));
  return values;
}

}  // namespace coreinfer
