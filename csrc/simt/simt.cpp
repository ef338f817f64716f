// SPDX-License-Identifier: Apache-2.0
//
// The runtime of simt.h: fibers, collectives and barriers, cp.async, launches. The one file to
// compile; the headers beside it are parts of it. Builds, beside the plain one:
//   ASan, UBSan  -fsanitize=address,undefined, here and for the kernels;
//   TSan         -fsanitize=thread for the kernels, -DSIMT_TSAN and no such flag here: what this
//                file does on a fiber's behalf is no access of that fiber;
//   valgrind     -DSIMT_VALGRIND here; no -march flag of a CPU that valgrind does not know.
//
// What makes undefined behaviour show:
//   - shared memory starts as 0xFF bytes, NaN in every floating-point type (undefined to valgrind),
//     and ends in a red zone;
//   - the destination of cp.async is such bytes again from issue to arrival, and a copy arrives no
//     sooner than in the wait that needs it, written by the thread that issued it: reading too
//     early, issuing too early and waiting too little all show;
//   - to TSan, only barriers and __syncwarp order memory. Blocks stay unordered until the launch
//     ends, so that it finds races between blocks, which never overlap here.
#include "simt.h"

#include <exception>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "schedule.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Config config;

namespace {

constexpr int kWarp = 32, kMaxThreads = 1024, kBarriers = 16;
constexpr size_t kMostTsanFibers = 2048;  // TSan has room for 8128, at a price

// One cp.async under way.
struct Copy {
  unsigned char data[16];
  void* shared;
  size_t bytes;
  unsigned group;
  Site site;
};

struct Fiber : Context {
  uint3 index;
  int warp, lane;
  const char* waits_at;  // what, and where
  Site site;
  Exchange exchange;
  std::vector<Copy> copies;  // oldest first, of which `arrived` are done
  size_t arrived;
  unsigned group;  // the number of groups committed
};

// Turns alternate between two of what a meeting leaves behind: a thread that is late to leave one
// must not find there what others brought to the next.
struct Meeting {
  char fence[2];  // addresses for TSan
  int turn;
};

struct Warp {
  uint32_t alive, ready, at_collective;  // lanes
  uint32_t at_barrier[kBarriers];
  uint32_t mask[kWarp];  // of the collective at which each lane waits
  void* payload[kWarp];
  Meeting meeting[kWarp];  // by the lowest lane of the mask
};

struct Barrier {
  int expected;  // threads; 0: all that have not exited
  int arrived, sum, result;
  Site site;
  Meeting meeting;
};

std::mutex launching;  // guards all that follows
thread_local bool in_launch = false;

Context host;
Fiber* current;
std::vector<Fiber> fibers;
Warp warps[kMaxThreads / kWarp];
Barrier barriers[kBarriers];
int threads, alive;
uint32_t ready_warps;
Schedule schedule;
void (*thread_function)(void*);
void* thread_context;
std::exception_ptr thrown;  // by the kernel

Stacks stacks;
SharedMemory shared;
std::vector<void*> tsan_fibers;    // of the launch, not yet destroyed
[[maybe_unused]] char launch_end;  // an address for TSan

// Failures. A fiber that fails is left as it stands, so that it may own nothing: it notes what went
// wrong, and the host finds the words.

struct Failure {
  const char* message = nullptr;
  Site site{}, others{};  // others.file is null where nobody waits elsewhere
  uint3 thread{};
};
Failure failure;

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

std::string describe(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}

[[noreturn]] void fail(const char* message, Site site, Site others) {
  if (!current) throw Error("simt: " + std::string(message) + " at " + describe(site));
  failure = {message, site, others, threadIdx};
  Fiber& self = *current;
  current = nullptr;
  switch_context(self, host, true);
  __builtin_unreachable();
}

std::string describe_failure() {
  std::string text = "simt: " + std::string(failure.message) + " at " + describe(failure.site);
  if (failure.others.file) text += " while others wait at " + describe(failure.others);
  return text + ", thread " + describe(failure.thread) + " of block " + describe(blockIdx);
}

// Who waits where, when none can run.
std::string describe_deadlock() {
  struct Group {
    const Fiber* first;
    int count;
  };
  std::vector<Group> groups;
  for (int thread = 0; thread < threads; ++thread) {
    const Fiber& fiber = fibers[thread];
    if (!(warps[fiber.warp].alive >> fiber.lane & 1)) continue;
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& group) {
      return same(group.first->site, fiber.site);
    });
    if (group == groups.end()) group = groups.insert(group, {&fiber, 0});
    ++group->count;
  }
  std::string text = "simt: deadlock in block " + describe(blockIdx) + ":";
  for (const Group& group : groups) {
    text += " " + std::to_string(group.count) + " threads wait at " + describe(group.first->site) +
            " (" + group.first->waits_at + ", first " + describe(group.first->index) + "),";
  }
  return text + " " + std::to_string(threads - alive) + " have exited";
}

// The scheduler.

// Makes the fiber current that is to run next; the host's turn comes when none can.
Context& choose() {
  if (!ready_warps) {
    current = nullptr;
    return host;
  }
  const int warp = schedule.next_warp(ready_warps);
  current = &fibers[warp * kWarp + schedule.next_lane(warps[warp].ready)];
  threadIdx = current->index;
  return *current;
}

void yield() {
  Fiber& self = *current;
  Context& next = choose();
  if (&next != &self) switch_context(self, next);
}

void sleep(const Fiber& fiber) {
  Warp& warp = warps[fiber.warp];
  warp.ready &= ~(1u << fiber.lane);
  if (!warp.ready) ready_warps &= ~(1u << fiber.warp);
}

void wake(int warp, uint32_t lanes) {
  warps[warp].ready |= lanes;
  if (lanes) ready_warps |= 1u << warp;
}

void open_if_complete(int id) {
  Barrier& barrier = barriers[id];
  if (!barrier.arrived || barrier.arrived < (barrier.expected ? barrier.expected : alive)) return;
  for (int warp = 0; warp * kWarp < threads; ++warp) {
    uint32_t& lanes = warps[warp].at_barrier[id];
    if (lanes && lanes != warps[warp].alive) {
      fail("a barrier that part of a warp skips", barrier.site, {});
    }
    wake(warp, lanes);
    lanes = 0;
  }
  barrier.result = barrier.sum;  // read by all before any meets another at this barrier
  barrier.meeting.turn ^= 1;
  barrier.arrived = barrier.sum = 0;
}

int meet(int id, int expected, int value, Site site) {
  Fiber& self = *current;
  Barrier& barrier = barriers[id];
  if (!barrier.arrived) {
    barrier.expected = expected;
    barrier.site = site;
  } else if (barrier.expected != expected) {
    fail("barrier with another number of threads", site, barrier.site);
  } else if (!expected && !same(barrier.site, site)) {
    fail("another barrier", site, barrier.site);
  }
  self.waits_at = "barrier";
  self.site = site;
  warps[self.warp].at_barrier[id] |= 1u << self.lane;
  ++barrier.arrived;
  barrier.sum += value;
  const int turn = barrier.meeting.turn;
  release(&barrier.meeting.fence[turn]);
  sleep(self);
  open_if_complete(id);
  yield();
  acquire(&barrier.meeting.fence[turn]);
  return barrier.result;
}

// The bottom of every fiber's stack.
void fiber_main() {
  begin_fiber(host);
  try {
    thread_function(thread_context);
  } catch (...) {
    thrown = std::current_exception();
  }
  Fiber& self = *current;
  Context* next = &host;
  if (!thrown) {
    if (self.arrived < self.copies.size()) {
      fail("a thread exits before it has waited for its cp.async", self.copies[self.arrived].site,
           {});
    }
    warps[self.warp].alive &= ~(1u << self.lane);
    sleep(self);
    --alive;
    for (int id = 0; id < kBarriers; ++id) {
      if (!barriers[id].expected) open_if_complete(id);
    }
    next = &choose();
  }
  switch_context(self, *next, true);
  __builtin_unreachable();
}

// Blocks.

void prepare_fiber(int thread) {
  Fiber& fiber = fibers[thread];
  const unsigned x = blockDim.x, y = blockDim.y;
  fiber.index = {thread % x, thread / x % y, thread / (x * y)};
  fiber.warp = thread / kWarp;
  fiber.lane = thread % kWarp;
  fiber.copies.clear();
  fiber.arrived = fiber.group = 0;
  stacks.renew(thread);
  fiber.stack = stacks.begin(thread);
  fiber.stack_bytes = stacks.bytes();
  fiber.fake_stack = nullptr;
#ifdef SIMT_TSAN
  fiber.tsan = __tsan_create_fiber(0);
  tsan_fibers.push_back(fiber.tsan);
  const std::string name =
      "CUDA thread " + describe(fiber.index) + " of block " + describe(blockIdx);
  __tsan_set_fiber_name(fiber.tsan, name.c_str());
#endif
  // Stacks lie a multiple of a page apart: without an offset, all would share a few sets of the
  // cache.
  unsigned char* top = stacks.begin(thread) + stacks.bytes() - fiber.lane * 128;
  void** frame = reinterpret_cast<void**>(top) - kFrameWords;
  std::memset(frame, 0, kFrameWords * sizeof(void*));
  frame[kReturnWord] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = frame;
}

// Returns what went wrong.
std::string run_block(size_t shared_bytes) {
  shared.renew(shared_bytes);
  std::memset(warps, 0, sizeof(warps));
  std::memset(barriers, 0, sizeof(barriers));
  host.stack = nullptr;
  alive = threads;
  ready_warps = 0;
  for (int thread = 0; thread < threads; ++thread) {
    prepare_fiber(thread);
    warps[thread / kWarp].alive |= 1u << thread % kWarp;
    wake(thread / kWarp, 1u << thread % kWarp);
  }
  schedule.begin_block((threads + kWarp - 1) / kWarp);
  switch_context(host, choose());
  if (thrown) return "";
  if (failure.message) return describe_failure();
  if (alive) return describe_deadlock();
  if (shared.overrun()) {
    return "simt: block " + describe(blockIdx) + " wrote outside its shared memory";
  }
  return "";
}

// TSan: what all fibers did comes before what the host does from here on.
void join_fibers() {
#ifdef SIMT_TSAN
  for (void* fiber : tsan_fibers) {
    __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
    release(&launch_end);
    __tsan_switch_to_fiber(host.tsan, __tsan_switch_to_fiber_no_sync);
    __tsan_destroy_fiber(fiber);
  }
  tsan_fibers.clear();
  acquire(&launch_end);
#endif
}

void check_limits(dim3 grid, dim3 block, size_t bytes) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  if (!count || count > kMaxThreads || block.z > 64) {
    throw Error("simt: a block has 1 to 1024 threads, not " + std::to_string(count));
  }
  if (!grid.x || grid.x > 0x7FFFFFFF || !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535) {
    throw Error("simt: no such grid: " + describe(uint3{grid.x, grid.y, grid.z}));
  }
  const size_t limit = std::min(config.shared_limit, SharedMemory::kMost);
  if (bytes > limit) {
    throw Error("simt: " + std::to_string(bytes) +
                " bytes of shared memory, of which a block has " + std::to_string(limit) +
                " at most");
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t bytes, void (*thread)(void*), void* context) {
  if (in_launch) throw Error("simt: a kernel cannot launch another");
  const std::lock_guard<std::mutex> lock(launching);
  check_limits(grid, block, bytes);
  schedule.begin(config);
  threads = block.x * block.y * block.z;
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  stacks.reserve(threads, config.stack_bytes);
  gridDim = grid;
  blockDim = block;
  thread_function = thread;
  thread_context = context;
  failure = {};
  thrown = nullptr;
  in_launch = true;
  host.tsan = current_tsan_fiber();
  std::string error;
  for (uint64_t i = 0; i < uint64_t{grid.x} * grid.y * grid.z; ++i) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    // Joining orders the blocks so far before the rest, which may hide a race but raises no alarm.
    if (tsan_fibers.size() + threads > kMostTsanFibers) join_fibers();
    error = run_block(bytes);
    if (!error.empty() || thrown) break;
  }
  join_fibers();
  in_launch = false;
  if (thrown) std::rethrow_exception(std::exchange(thrown, nullptr));
  if (!error.empty()) throw Error(error);
}

void fail(const char* message, Site site) { fail(message, site, {}); }

int lane() { return current->lane; }

unsigned char* shared_memory() { return shared.begin(); }

void check_shared(const void* address, size_t bytes, Site site) {
  if (!shared.contains(static_cast<const unsigned char*>(address), bytes)) {
    fail("address outside of shared memory", site);
  }
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned shared address", site);
}

void warp_collective(uint32_t mask, void* payload, Exchange exchange, Fence fence, Site site) {
  Fiber& self = *current;
  Warp& warp = warps[self.warp];
  const uint32_t bit = 1u << self.lane;
  if (!(mask & bit)) fail("a lane is not in the mask that it gives", site);
  if (mask & ~warp.alive) fail("a mask names lanes that have exited", site);
  if (const uint32_t others = warp.at_collective & mask) {
    // One that waits for this lane must wait right here.
    const int lane = __builtin_ctz(others);
    const Fiber& other = fibers[self.warp * kWarp + lane];
    const bool alike =
        warp.mask[lane] == mask && other.exchange == exchange && same(other.site, site);
    if (warp.mask[lane] & bit && !alike) {
      fail("another warp collective", site, other.site);
    }
  }
  self.waits_at = "warp collective";
  self.site = site;
  self.exchange = exchange;
  warp.payload[self.lane] = payload;
  warp.mask[self.lane] = mask;
  warp.at_collective |= bit;
  Meeting& meeting = warp.meeting[__builtin_ctz(mask)];
  const int turn = meeting.turn;
  if (fence == Fence::kWarp) release(&meeting.fence[turn]);
  bool complete = (warp.at_collective & mask) == mask;
  for (uint32_t left = complete ? mask : 0; left; left &= left - 1) {
    complete &= warp.mask[__builtin_ctz(left)] == mask;
  }
  if (complete) {
    if (exchange) exchange(warp.payload, mask);
    warp.at_collective &= ~mask;
    wake(self.warp, mask);
    meeting.turn ^= 1;
    if (!schedule.last_lane_goes_on()) yield();
  } else {
    sleep(self);
    yield();
  }
  if (fence == Fence::kWarp) acquire(&meeting.fence[turn]);
}

int block_barrier(int value, Site site) { return meet(0, 0, value, site); }

void named_barrier(int id, int expected, Site site) {
  if (id < 0 || id >= kBarriers) fail("a barrier has a number from 0 to 15", site);
  if (expected < kWarp || expected > threads || expected % kWarp) {
    fail("a named barrier takes whole warps of the block", site);
  }
  meet(id, expected, 0, site);
}

void cp_async_issue(void* destination, const void* data, size_t bytes, Site site) {
  check_shared(destination, bytes, site);
  Fiber& self = *current;
  note_write(destination, bytes, __builtin_return_address(0));
  const Unseen books;
  Copy copy{{}, destination, bytes, self.group, site};
  std::memcpy(copy.data, data, bytes);
  self.copies.push_back(copy);
  poison(destination, bytes);
}

void cp_async_commit() { ++current->group; }

void cp_async_wait(unsigned groups) {
  Fiber& self = *current;
  for (; self.arrived < self.copies.size(); ++self.arrived) {
    const Copy& copy = self.copies[self.arrived];
    if (copy.group + groups >= self.group) break;
    note_write(copy.shared, copy.bytes, __builtin_return_address(0));
    const Unseen books;
    std::memcpy(copy.shared, copy.data, copy.bytes);
  }
  const Unseen books;
  self.copies.erase(self.copies.begin(), self.copies.begin() + self.arrived);
  self.arrived = 0;
}

}  // namespace simt
