#include "bundle_folder.h"

#include "coreinfer.h"
#include "failure.h"
#include "refusals.h"
#include "sha256.h"

namespace coreinfer {
namespace {

// Names of the layout, docs/format.md.
const std::string kManifest = "manifest.json", kBase = "base.safetensors", kDense = "dense.safetensors",
                  kGeneration = "tokenizer/generation.json";
constexpr int kVersion = 3, kOldVersion = 2;  // in the old one all clusters have the plan's layer budgets
constexpr int kThinVersion = 4;               // from here on clusters may have no pack of their own
constexpr int kNewestVersion = 7;  // 5: mixtures with token shares; 6: inputs read in half; 7: listed experts

Json parse(const WholeFile& file) {
  return Json::parse({reinterpret_cast<const char*>(file.data()), file.num_bytes()});
}

// Whether a name is a path inside the bundle.
bool is_inside(const std::string& name) {
  const std::string parts = "/" + name + "/";
  return !name.empty() && name[0] != '/' && parts.find("/../") == std::string::npos &&
         name.find('\\') == std::string::npos && name.find('\0') == std::string::npos;
}

std::vector<int> numbers(const Json& object, const char* key) {
  std::vector<int> values;
  for (const Json& item : object.array(key)) {
    const long long value = item.as_size(key);
    if (value > 1 << 30) refuse(key, "fewer neurons", std::to_string(value));
    values.push_back(static_cast<int>(value));
  }
  return values;
}

}  // namespace

BundleFolder::BundleFolder(const std::string& folder, bool checks_sums, bool spares_memory)
    : folder_(folder), checks_sums_(checks_sums), spares_memory_(spares_memory) {
  manifest_ = parse(WholeFile(folder + "/" + kManifest));
  const int version = manifest_.integer("schema_version");
  if (version < kOldVersion || version > kNewestVersion)
    throw Failure(COREINFER_VERSION, folder + ": schema version " + std::to_string(version) + ", this library reads " +
                                         std::to_string(kOldVersion) + " to " + std::to_string(kNewestVersion));
  model_ = read_record(manifest_.object("model"));
  ffn_format_ = manifest_.object("quantization").object("ffn").string("format");
  read_clusters();
  read_end_ids();
}

void BundleFolder::read_clusters() {
  const int version = manifest_.integer("schema_version");
  for (const Json& cluster : manifest_.array("clusters")) {
    const bool is_thin = version >= kThinVersion && !Json::is_given(cluster.find("file"));
    if (is_thin && !has_dense()) refuse("clusters", "a file of each, or a dense FFN", "neither");
    clusters_.push_back({is_thin ? std::string() : cluster.string("file"), cluster.string("label"),
                         numbers(version == kOldVersion ? manifest_.object("plan") : cluster, "layer_budgets")});
  }
  if (clusters_.empty()) refuse("clusters", "at least one", "none");
}

void BundleFolder::read_end_ids() {
  const Json generation = parse(*open(kGeneration));
  for (const Json& id : generation.array("eos_token_ids"))
    end_ids_.insert(static_cast<int32_t>(id.as_size("eos_token_ids")));
}

bool BundleFolder::has_dense() const { return manifest_.object("files").find(kDense) != nullptr; }

bool BundleFolder::narrows_experts() const {
  const Json* experts = manifest_.object("plan").find("experts");
  if (!Json::is_given(experts)) return false;
  const std::string kind = manifest_.object("plan").string("experts");
  if (kind != "whole" && kind != "narrow" && kind != "both")
    refuse("plan.experts", "whole, narrow or both", "'" + kind + "'");
  return kind != "whole";
}

std::unique_ptr<const WholeFile> BundleFolder::open(const std::string& name) const {
  if (!is_inside(name)) refuse("manifest", "paths inside the bundle", "'" + name + "'");
  const Json& record = manifest_.object("files").object(name);
  auto file = std::make_unique<const WholeFile>(folder_ + "/" + name);
  const auto num_bytes = static_cast<unsigned long long>(record.size("bytes"));
  if (file->num_bytes() != num_bytes)
    refuse(name, std::to_string(num_bytes) + " bytes", std::to_string(file->num_bytes()));
  if (checks_sums_) {
    const auto passed = [&](size_t from, size_t count) {
      if (spares_memory_) file->forget(from, count);
    };
    const std::string expected = record.string("sha256"), got = sha256(file->data(), file->num_bytes(), passed);
    if (got != expected) refuse(name, "sha256 " + expected.substr(0, 12) + "...", got.substr(0, 12) + "...");
  }
  return file;
}

std::shared_ptr<MappedTensors> BundleFolder::open_tensors(const std::string& name) const {
  return std::make_shared<MappedTensors>(name, open(name));
}

std::shared_ptr<MappedTensors> BundleFolder::base() const {
  auto base = open_tensors(kBase);
  const Json& expected = manifest_.object("base_tensors");
  for (size_t i = 0; i < expected.keys.size(); ++i) {
    std::vector<long long> shape;
    for (const Json& extent : expected.items[i].array("shape")) shape.push_back(extent.as_size("shape"));
    base->tensors.check(expected.keys[i], expected.items[i].string("dtype"), shape);
  }
  return base;
}

std::shared_ptr<MappedTensors> BundleFolder::dense() const {
  if (!has_dense()) throw Failure(COREINFER_NOT_FOUND, "bundle " + folder_ + " has no dense FFN; use a cluster");
  return open_tensors(kDense);
}

std::shared_ptr<MappedTensors> BundleFolder::pack(int cluster) const { return open_tensors(clusters_[cluster].file); }

int BundleFolder::weights_of(int cluster) const {
  return cluster == COREINFER_DENSE || clusters_[cluster].file.empty() ? COREINFER_DENSE : cluster;
}

std::vector<std::vector<int>> BundleFolder::experts(int cluster) const {
  const auto file = pack(cluster);
  std::vector<std::vector<int>> layers;
  for (const int count : clusters_[cluster].num_neurons) {
    const std::string name = "layers." + std::to_string(layers.size()) + ".experts";
    const int size = count / model_.ffn_neurons();
    const int32_t* numbers = file->tensors.numbers(name, size);
    layers.emplace_back(numbers, numbers + size);
  }
  return layers;
}

}  // namespace coreinfer
