// Which part of a bundle is in memory under a limit: sums over sizes, nothing is read.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model_record.h"

namespace coreinfer {

// Bytes of an FFN's layers as they are read: all together, and of the largest; of mixtures of their experts.
struct FfnSizes {
  uint64_t total = 0, largest = 0;
};

// What there is to hold.
struct WeightSizes {
  uint64_t base;         // the whole base
  uint64_t tables;       // of it, tables of which a token needs a few rows only (TableBytes)
  uint64_t table_block;  // most that a block of 16 rows of such a table takes in whole pages
  uint64_t page;         // of the KV cache
  int num_chosen;        // experts of a token; 0 where layers are read as a whole
  std::vector<FfnSizes> packs;
  std::optional<FfnSizes> dense;  // none in a bundle without the dense FFN
};

// Bytes for each part; together they are the limit.
struct MemoryPlan {
  uint64_t base;      // what always stays of the base
  uint64_t window;    // for rows of its tables; 0 where the tables stay as a whole
  uint64_t kv_cache;  // for keys and values
  uint64_t layers;    // for layers of FFNs or experts, kept or passing through
};

// By the number of neurons in each layer, of all its experts together, in whole sectors; a few bytes more than there are. `format`: the FFN's in the
// manifest. Throws std::invalid_argument: the engine does not read such a format, there is no layer, or
// a layer has fewer neurons than a token has experts.
FfnSizes ffn_sizes(const ModelRecord& record, const std::string& format, const std::vector<int>& num_neurons);

// Share a limit out: base, KV cache, rows of tables, and the rest for layers of FFNs. `kv_cache`: bytes as asked for; 0 for an
// eighth of the limit, or for less where that leaves layers too little. Throws std::invalid_argument: the limit is too
// small; "expected ..., got ..." with the figures, without a name before it.
MemoryPlan plan_memory(uint64_t limit, const WeightSizes& sizes, uint64_t kv_cache);

}  // namespace coreinfer
