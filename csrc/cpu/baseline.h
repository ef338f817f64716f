// SPDX-License-Identifier: Apache-2.0
//
// What kernels share with code of the build's base instructions: included before a file changes its
// target, or the linker might keep, of a function that several files compile, one that not every
// machine can run.
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

#include "call.h"
