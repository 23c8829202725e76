// Whether this machine gains where tokens leave inputs out: what decides is how its memory reads pieces with holes between.
#pragma once

#include "decoder.h"

namespace coreinfer {

// Of each group of inputs, in some of the decoder's layers: the time by rows over the time input by input, where a token
// wants this share of the weights. Above 1 columns are faster; 0 where the group cannot lie so. Takes some tens of
// milliseconds, and lays these layers out. An FFN must be in use, and no pass run.
//
// `in_planes`: whether inputs may read the high bits alone.
std::array<double, kNumInputGroups> try_columns(Decoder& decoder, double share, bool in_planes);

}  // namespace coreinfer
