// Lanes, warps and blocks; see runtime.h.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>

#include "fibers.h"
#include "traffic.h"

#if defined(__SANITIZE_ADDRESS__)
  #include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host_cuda {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kMaxThreads = 1024;
constexpr size_t kMaxShared = 227 << 10;
constexpr size_t kSharedGuard = 4096;
constexpr unsigned kPoison = 0xff;  // NaN in fp16, bf16 and fp32

struct Copy {
  uint32_t destination;
  uint32_t bytes, source_bytes;
  const void* source;
};

struct Lane {
  void* stack_pointer = nullptr;
  uint3 index{};
  Warp* warp = nullptr;
  int lane = 0;
  std::vector<Copy> copies;          // in flight, oldest first
  std::vector<uint32_t> group_ends;  // where in `copies` the committed groups end
  int phase = 0;
  int barrier_line = 0;
  const char* barrier_file = nullptr;
};

struct Warp {
  Lane* lanes = nullptr;  // 32 of them, fewer in the last warp of an odd block
  uint32_t launched = 0;
  uint32_t live = 0;     // lanes that have not returned
  uint32_t waiting = 0;  // at a warp operation
  uint32_t at_barrier = 0;
  int current = 0;  // the lane to resume
  const WarpOp* op[32]{};
  void* operands[32]{};

  uint32_t ready() const { return live & ~(waiting | at_barrier); }
};

namespace {

struct Block {
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  size_t dynamic_shared = 0;
};

Block block;
Lane* self = nullptr;
void* scheduler_stack = nullptr;
void (*kernel_function)(const void*) = nullptr;
const void* kernel_context = nullptr;
std::string failure;
Order order;
std::minstd_rand preempt_rng;

alignas(1024) unsigned char shared_memory[kMaxShared + kSharedGuard];

unsigned char* stacks() {
  static auto* memory =
      static_cast<unsigned char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

void resume(Lane* lane) {
  void** save = self ? &self->stack_pointer : &scheduler_stack;
  self = lane;
  if (lane) {
    threadIdx = lane->index;
    lane->warp->current = lane->lane;
    switch_stack(save, lane->stack_pointer);
  } else {
    switch_stack(save, scheduler_stack);
  }
  // Back here: whoever resumed this fiber has set `self` and threadIdx for it.
}

// The next lane of the warp that can run, in ring order.
Lane* next_ready(Warp& warp, int after) {
  uint32_t ready = warp.ready();
  if (!ready) return nullptr;
  uint32_t later = after == 31 ? 0 : ready & (~0u << (after + 1));
  return &warp.lanes[__builtin_ctz(later ? later : ready)];
}

// Every lane of the warp is blocked: execute the operation that can be executed. False: the warp waits at a
// barrier.
bool resolve(Warp& warp) {
  if (!warp.waiting) return false;
  // Lanes at a memory access may still join the others at a collective, so they go first.
  int first = -1;
  for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (first < 0) first = lane;
    if (!warp.op[lane]->collective) {
      first = lane;
      break;
    }
  }
  const WarpOp* op = warp.op[first];
  uint32_t group = 0;
  for (uint32_t rest = warp.waiting; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    if (warp.op[lane] == op) group |= 1u << lane;
  }
  if (op->collective && group != warp.launched)
    fail(std::string(op->name) + ": not every lane of the warp takes part");
  statistics().collectives++;
  counted_phase = warp.lanes[first].phase;
  op->execute(warp, group);
  warp.waiting &= ~group;
  return true;
}

// The running lane is blocked or done: run something else until it can go on.
void give_way() {
  Lane* me = self;
  Warp& warp = *me->warp;
  for (;;) {
    if (Lane* next = next_ready(warp, me->lane)) {
      if (next != me) resume(next);
      return;
    }
    if (!resolve(warp)) {
      resume(nullptr);
      return;
    }
    if (order == Order::kRandom && (preempt_rng() & 31) == 0) {  // let another warp overtake
      resume(nullptr);
      return;
    }
  }
}

// A lane that gives way may be resumed while it is still blocked only by mistake of this file: loop to be
// sure.
void block_until(uint32_t Warp::* set) {
  Lane* me = self;
  while (me->warp->*set & (1u << me->lane)) give_way();
}

extern "C" void host_cuda_lane() {
  kernel_function(kernel_context);
  if (!self->copies.empty())
    fail("the thread returned with cp.async copies in flight that nobody waited for");
  Warp& warp = *self->warp;
  warp.live &= ~(1u << self->lane);
  for (;;) give_way();
}

void prepare(Lane& lane, size_t thread) {
  // Colour the stacks: at equal offsets in their pages all hot frames would share a few cache sets.
  lane.stack_pointer =
      fresh_stack(stacks() + (thread + 1) * kStackBytes - (thread * 832) % 16384, &host_cuda_lane);
}

void run_block(std::mt19937_64& rng) {
  memset(shared_memory, kPoison, block.dynamic_shared);
  statistics().blocks++;
  std::vector<int> sequence(block.warps.size());
  for (size_t w = 0; w < sequence.size(); w++) sequence[w] = static_cast<int>(w);
  if (order == Order::kDescending) std::reverse(sequence.begin(), sequence.end());
  for (;;) {
    if (order == Order::kRandom) std::shuffle(sequence.begin(), sequence.end(), rng);
    bool ran = false, live = false;
    for (int w : sequence) {
      Warp& warp = block.warps[w];
      if (!warp.ready()) continue;
      ran = true;
      self = nullptr;
      if (!(warp.ready() >> warp.current & 1)) warp.current = __builtin_ctz(warp.ready());
      resume(&warp.lanes[warp.current]);
      self = nullptr;
      if (!failure.empty()) return;
      if (order == Order::kRandom && warp.ready()) break;  // preempted: draw again
    }
    for (Warp& warp : block.warps) live |= warp.live != 0;
    if (!live) return;
    if (ran) continue;
    // Everyone who is left waits at a barrier: they must all wait at the same one.
    const Lane* first = nullptr;
    for (Warp& warp : block.warps) {
      for (uint32_t rest = warp.at_barrier; rest; rest &= rest - 1) {
        const Lane* lane = &warp.lanes[__builtin_ctz(rest)];
        if (!first) first = lane;
        if (lane->barrier_line != first->barrier_line) {
          failure = "threads of one block wait at different __syncthreads(): lines " +
                    std::to_string(first->barrier_line) + " and " + std::to_string(lane->barrier_line);
          return;
        }
      }
    }
    for (Warp& warp : block.warps) warp.at_barrier = 0;
    statistics().barriers++;
  }
}

}  // namespace

// ---------------------------------------------------------------- called by kernels
void perform(const WarpOp& op, void* operands) {
  Lane* me = self;
  Warp& warp = *me->warp;
  const uint32_t bit = 1u << me->lane;
  warp.op[me->lane] = &op;
  warp.operands[me->lane] = operands;
  warp.waiting |= bit;
  block_until(&Warp::waiting);
}

void barrier(const char* file, int line) {
  self->barrier_file = file;
  self->barrier_line = line;
  self->warp->at_barrier |= 1u << self->lane;
  block_until(&Warp::at_barrier);
}

void set_phase(int which) {
  self->phase = which;
}

void fail(const std::string& what) {
  char where[128];
  snprintf(where, sizeof where, " [block (%u,%u,%u) thread %u]", blockIdx.x, blockIdx.y, blockIdx.z,
           threadIdx.x);
  failure = what + where;
  for (;;) resume(nullptr);  // the block is abandoned: never comes back
}

unsigned char* shared_base() {
  return shared_memory;
}

uint32_t shared_offset(const void* pointer, uint32_t bytes) {
  auto offset = static_cast<const unsigned char*>(pointer) - shared_memory;
  if (offset < 0 || offset + bytes > static_cast<ptrdiff_t>(block.dynamic_shared)) {
    fail("shared memory: offset " + std::to_string(offset) + " + " + std::to_string(bytes) +
         " is outside of " + std::to_string(block.dynamic_shared) + " bytes");
  }
  if (offset % bytes)
    fail("shared memory: offset " + std::to_string(offset) + " is not a multiple of the access size " +
         std::to_string(bytes));
  return static_cast<uint32_t>(offset);
}

void copy_async(uint32_t offset, const void* source, uint32_t bytes, uint32_t source_bytes) {
  memset(shared_memory + offset, kPoison, bytes);
  self->copies.push_back({offset, bytes, source_bytes, source});
}

void commit_copies() {
  self->group_ends.push_back(static_cast<uint32_t>(self->copies.size()));
}

void wait_copies(uint32_t left) {
  auto& groups = self->group_ends;
  if (groups.size() <= left) return;
  size_t done = groups.size() - left;
  uint32_t last = groups[done - 1];
  for (uint32_t c = 0; c < last; c++) {
    const Copy& copy = self->copies[c];
    memcpy(shared_memory + copy.destination, copy.source, copy.source_bytes);
    memset(shared_memory + copy.destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
  }
  self->copies.erase(self->copies.begin(), self->copies.begin() + last);
  groups.erase(groups.begin(), groups.begin() + static_cast<long>(done));
  for (uint32_t& end : groups) end -= last;
}

void* warp_operands(Warp& warp, int lane) {
  return warp.operands[lane];
}
// ---------------------------------------------------------------- called by the harness
std::string launch(void (*kernel)(const void*), const void* context, Dim3 grid, Dim3 threads,
                   size_t dynamic_shared, Options options) {
  const size_t count = size_t{threads.x} * threads.y * threads.z;
  if (!count || count > kMaxThreads) return "block of " + std::to_string(count) + " threads";
  if (dynamic_shared > kMaxShared)
    return "dynamic shared memory of " + std::to_string(dynamic_shared) + " bytes";
  kernel_function = kernel;
  kernel_context = context;
  failure.clear();
  order = options.order;
  preempt_rng.seed(static_cast<uint32_t>(options.seed * 2654435761u + 1));
  std::mt19937_64 rng(options.seed);
  block.dynamic_shared = dynamic_shared;
  blockDim = {threads.x, threads.y, threads.z};
  gridDim = {grid.x, grid.y, grid.z};
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(shared_memory, sizeof shared_memory);
  ASAN_POISON_MEMORY_REGION(shared_memory + (dynamic_shared + 7) / 8 * 8,
                            kMaxShared + kSharedGuard - (dynamic_shared + 7) / 8 * 8);
#endif
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t b = 0; b < blocks.size(); b++) blocks[b] = b;
  if (order == Order::kDescending) std::reverse(blocks.begin(), blocks.end());
  if (order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), rng);
  block.lanes.assign(count, Lane());
  for (uint64_t b : blocks) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    block.warps.assign((count + 31) / 32, Warp());
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stacks(), count * kStackBytes);
#endif
    for (size_t t = 0; t < count; t++) {
      Lane& lane = block.lanes[t];
      Warp& warp = block.warps[t / 32];
      if (t % 32 == 0) warp.lanes = &lane;
      lane.warp = &warp;
      lane.lane = static_cast<int>(t % 32);
      lane.index = {static_cast<unsigned>(t % threads.x), static_cast<unsigned>(t / threads.x % threads.y),
                    static_cast<unsigned>(t / threads.x / threads.y)};
      lane.phase = 0;
      lane.copies.clear();
      lane.group_ends.clear();
      warp.launched = warp.live |= 1u << lane.lane;
      prepare(lane, t);
    }
    run_block(rng);
    if (!failure.empty()) break;
  }
  return failure;
}

}  // namespace host_cuda
