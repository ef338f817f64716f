// SPDX-License-Identifier: Apache-2.0
//
// Every standard header that the kernels use, to be included before a file changes its target.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>
