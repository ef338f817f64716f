// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "../philox.h"

namespace fastdeberta::cpu {

// Writes keep[sequence_heads, query_len, key_len]: whether dropout keeps each score.
void dropout_keep(const DropoutRule& rule, int64_t sequence_heads, int64_t query_len,
                  int64_t key_len, bool* keep);

}  // namespace fastdeberta::cpu
