// Runs a grid of CUDA threads on one CPU thread: blocks one after another, one fiber per thread of a block.
//
// What a GPU leaves undefined is made to hurt: shared memory starts as NaN and is followed by a guard page, the destination of an
// asynchronous copy holds NaN from its issue until it lands, it lands as late as its wait allows or at a random moment before, warps are
// interleaved at random, and lanes that do not meet at a collective or a barrier end the launch with a message.

#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulator {

extern "C" Current emulator_current;
Current emulator_current;

namespace {

constexpr int WARP = 32;
constexpr int MAX_THREADS = 1024;
constexpr int BARRIERS = 16;
constexpr uint32_t ALL_LANES = 0xffffffffu;
constexpr uint64_t PAGE = 4096;
constexpr uint64_t STACK = 256 << 10;
constexpr uint32_t SHARED_START = 1024;  // Address 0 of shared memory is not the kernel's: newer devices keep a kilobyte there.
constexpr int POISON = 0xff;             // NaN in float, half and bf16; -1 in an int.
constexpr int CANARY = 0xc5;

const char* const NAMES[] = {
    "sync_warp",      "warp_index",     "shuffle",
    "any_in_warp",    "all_in_warp",    "load_matrix_x4",
    "load_matrix_x4_transposed", "load_matrix_x2", "load_matrix_x2_transposed",
    "move_matrix",    "mma_m16n8k16<bf16>", "mma_m16n8k16<half>",
    "mma_m16n8k8_tf32", "named_barrier_arrive", "wgmma",
    "wgmma_fence",    "wgmma_commit",   "wgmma_wait",      "fence_async_reads",
};

struct Copy {
  uint32_t shared;
  const unsigned char* global;
  int bytes;
  bool valid;
  int group;
};

struct Thread {
  Context context;
  std::vector<Copy> copies;
  int committed;
  uint32_t awaited, parity;  // memory barrier, 0 for none, and the phase that must be over
  float* accumulators;       // of the wgmma that this thread asks for
  const uint32_t* multiplicand;
};

struct Warp {
  uint32_t ready, collective, barrier, exited;  // lanes in each state
  int barrier_id;
  Operation operation;
  uint32_t in[WARP][6];
  uint32_t out[WARP][4];
};

struct Barrier {
  int arrived, threads;
  uint32_t passed;  // warps that arrived without waiting
  uint32_t lanes[MAX_THREADS / WARP];
};

Thread threads[MAX_THREADS];
Warp warps[MAX_THREADS / WARP];
Barrier barriers[BARRIERS];
Context launcher;
int thread_count, warp_count, alive;
bool descending;  // order in which the lanes of a warp take turns
uint64_t random_state;
unsigned char* stacks;
unsigned char *shared_pages, *shared_end;  // mapped and accessible
uint32_t shared_bytes;
void (*kernel)(const void*);
const void* kernel_arguments;
const char* kernel_name;
char message[1024];
sigjmp_buf escape;
float half_values[1 << 16];

uint32_t random_below(uint32_t n) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1dull) >> 33) % n;
}

Warp& this_warp() { return warps[emulator_current.thread / WARP]; }
uint32_t this_lane_bit() { return 1u << (emulator_current.thread % WARP); }

#include "race_check.h"

// Bytes between a guarded tensor and the end of its pages, which its alignment leaves unprotected: by the tensor's address, first and last.
std::map<const void*, std::pair<const unsigned char*, const unsigned char*>> margins;

void check_margins() {
  for (const auto& [tensor, margin] : margins)
    for (const unsigned char* p = margin.first; p < margin.second; ++p)
      if (*p != POISON) emulator_fail("the tensor at %p was written %lld bytes behind its end", tensor, static_cast<long long>(p - margin.first));
}

// Of hopper_engine.h, below.
bool land_a_box();
bool land_a_reduction();
void work_ahead();
int describe_hopper_waits(char* text, int size);

// ---- Scheduling

void run_thread(int next) {
  const int previous = emulator_current.thread;
  if (next == previous) return;
  emulator_current.thread = next;
  switch_context(threads[previous].context, threads[next].context);
}

int lane_after(uint32_t ready, int lane) {
  const uint32_t others = descending ? ready & ((1u << lane) - 1) : ready & ~((2u << lane) - 1);
  const uint32_t candidates = others ? others : ready;
  return descending ? 31 - __builtin_clz(candidates) : __builtin_ctz(candidates);
}

int ready_warp() {
  const int start = static_cast<int>(random_below(warp_count));
  for (int i = 0; i < warp_count; ++i) {
    const int warp = (start + i) % warp_count;
    if (warps[warp].ready) return warp;
  }
  return -1;
}

void report_deadlock() {
  char states[800];
  int length = describe_hopper_waits(states, 500);
  for (int warp = 0; warp < warp_count && length < 700; ++warp) {
    const Warp& w = warps[warp];
    if (w.barrier) length += snprintf(states + length, sizeof states - length, " warp %d waits at barrier %d;", warp, w.barrier_id);
    else if (w.exited == ALL_LANES) length += snprintf(states + length, sizeof states - length, " warp %d has exited;", warp);
  }
  emulator_fail("deadlock: no thread can go on;%s", states);
}

// The current thread cannot go on (or has exited): hands over to one that can.
void yield_blocked() {
  const int thread = emulator_current.thread;
  Warp& warp = this_warp();
  while (!warp.ready && ready_warp() < 0 && (land_a_box() || land_a_reduction())) {
  }
  if (warp.ready) {
    run_thread(thread / WARP * WARP + lane_after(warp.ready, thread % WARP));
  } else if (const int other = ready_warp(); other >= 0) {
    run_thread(other * WARP + lane_after(warps[other].ready, static_cast<int>(random_below(WARP))));
  } else if (alive == 0) {
    switch_context(threads[thread].context, launcher);
  } else {
    report_deadlock();
  }
}

// Lets another warp run now and then, though the current one could go on.
void yield_sometimes() {
  if (random_below(16) != 0) return;
  const int other = ready_warp();
  run_thread(other * WARP + lane_after(warps[other].ready, static_cast<int>(random_below(WARP))));
}

void release(int id) {
  Barrier& barrier = barriers[id];
  for (int warp = 0; warp < warp_count; ++warp) {
    if (!barrier.lanes[warp]) continue;
    if (barrier.lanes[warp] != ALL_LANES) emulator_fail("only lanes %08x of warp %d arrive at barrier %d", barrier.lanes[warp], warp, id);
    publish(meeting[id], warp);
  }
  for (int warp = 0; warp < warp_count; ++warp) {
    if (!barrier.lanes[warp]) continue;
    join(clocks[warp], meeting[id]);
    warps[warp].ready = ALL_LANES;
    warps[warp].barrier = 0;
    barrier.lanes[warp] = 0;
  }
  meeting[id] = {};
  barrier.arrived = 0;
  barrier.passed = 0;
}

void arrive_without_waiting(Warp& warp) {
  const int id = static_cast<int>(warp.in[0][0]), count = static_cast<int>(warp.in[0][1]);
  const uint32_t bit = 1u << (&warp - warps);
  Barrier& barrier = barriers[id % BARRIERS];
  if (id < 1 || id >= BARRIERS) emulator_fail("barrier %d: named barriers are 1 to 15", id);
  if (barrier.arrived && barrier.threads != count) emulator_fail("barrier %d of %d threads, while others wait there for %d", id, count, barrier.threads);
  if (barrier.passed & bit) emulator_fail("the warp arrives at barrier %d twice before it is complete", id);
  barrier.threads = count;
  barrier.passed |= bit;
  publish(meeting[id], static_cast<int>(&warp - warps));
  if ((barrier.arrived += WARP) == count) release(id);
}

void thread_body() {
  kernel(kernel_arguments);
  Warp& warp = this_warp();
  if (warp.collective) emulator_fail("the thread exits while lanes %08x of its warp wait at %s", warp.collective, NAMES[warp.operation]);
  if (warp.barrier) emulator_fail("the thread exits while lanes %08x of its warp wait at barrier %d", warp.barrier, warp.barrier_id);
  warp.ready &= ~this_lane_bit();
  warp.exited |= this_lane_bit();
  --alive;
  // An exited thread no longer counts at barrier 0, so the rest may be complete now.
  if (alive > 0 && barriers[0].arrived == alive) release(0);
  yield_blocked();
}

// ---- Shared memory and asynchronous copies

unsigned char* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address % alignment) emulator_fail("%s: shared address %#x is not aligned to %u bytes", what, address, alignment);
  const int64_t offset = static_cast<int64_t>(address) - SHARED_START;
  if (offset < 0 || offset + bytes > shared_bytes)
    emulator_fail("%s: bytes %lld to %lld are outside the %u bytes of shared memory", what, static_cast<long long>(offset),
                  static_cast<long long>(offset + bytes), shared_bytes);
  return emulator_current.shared + offset;
}

void land(const Copy& copy) {
  unsigned char* target = emulator_current.shared + (copy.shared - SHARED_START);
  if (copy.valid) memcpy(target, copy.global, copy.bytes);
  else memset(target, 0, copy.bytes);
}

void land_at(std::vector<Copy>& copies, size_t index) {
  std::swap(copies[index], copies.back());
  land(copies.back());
  if (watched) check_access(copies.back().shared - SHARED_START, copies.back().bytes, Access::LAND);
  copies.pop_back();
}

void land_sometimes() {
  work_ahead();
  auto& copies = threads[emulator_current.thread].copies;
  if (!watched && !copies.empty() && random_below(16) == 0) land_at(copies, random_below(static_cast<uint32_t>(copies.size())));
}

// ---- Warp operations: in[lane] of all lanes to out[lane]

void load_matrices(Warp& w, int count, bool transposed) {
  const unsigned char* rows[32];
  for (int i = 0; i < 8 * count; ++i) {
    rows[i] = shared_at(w.in[i][0], 16, 16, NAMES[w.operation]);
    watch(rows[i], 16, Access::READ);
  }
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int m = 0; m < count; ++m) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = transposed ? 2 * q + i : g, column = transposed ? g : 2 * q + i;
        memcpy(&pair[i], rows[8 * m + row] + 2 * column, 2);
      }
      memcpy(&w.out[lane][m], pair, 4);
    }
  }
}

void move_matrix(Warp& w) {
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, q = lane % 4;
    uint32_t pair = 0;
    for (int i = 0; i < 2; ++i) {  // element (row 2 q + i, column g) of the source
      const uint32_t source = w.in[(2 * q + i) * 4 + g / 2][0];
      pair |= (source >> (16 * (g % 2)) & 0xffffu) << (16 * i);
    }
    w.out[lane][0] = pair;
  }
}

float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
typedef float Row __attribute__((vector_size(32)));  // 8 columns of b or d

// GCC picks the clone that the CPU can run when the engine is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_THIS_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

template <int K>
inline __attribute__((always_inline)) void multiply(Warp& w, const float (&a)[16][K], const float (&b)[K][8]) {
  Row columns[K];
  memcpy(columns, b, sizeof columns);
  float d[16][8];
  for (int i = 0; i < 16; ++i) {
    Row sum = {};
    for (int k = 0; k < K; ++k) sum += a[i][k] * columns[k];
    memcpy(d[i], &sum, sizeof sum);
  }
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, q = lane % 4;
    memcpy(&w.out[lane][0], &d[g][2 * q], 8);
    memcpy(&w.out[lane][2], &d[g + 8][2 * q], 8);
  }
}

template <class Value>
inline __attribute__((always_inline)) void multiply_16_bit(Warp& w, Value value) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, q = lane % 4;
    const uint32_t* in = w.in[lane];
    for (int r = 0; r < 4; ++r) {
      const float pair[2] = {value(in[r] & 0xffffu), value(in[r] >> 16)};
      memcpy(&a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1)], pair, sizeof pair);
    }
    for (int r = 0; r < 2; ++r) {
      b[2 * q + 8 * r][g] = value(in[4 + r] & 0xffffu);
      b[2 * q + 8 * r + 1][g] = value(in[4 + r] >> 16);
    }
  }
  multiply<16>(w, a, b);
}

FOR_THIS_CPU void multiply_bf16(Warp& w) {
  multiply_16_bit(w, [](uint32_t bits) { return bits_to_float(bits << 16); });
}
FOR_THIS_CPU void multiply_half(Warp& w) {
  multiply_16_bit(w, [](uint32_t bits) { return half_values[bits]; });
}
FOR_THIS_CPU void multiply_tf32(Warp& w) {
  float a[16][8], b[8][8];
  const auto value = [](uint32_t bits) { return bits_to_float(bits & ~0x1fffu); };  // the hardware ignores the low 13 bits
  for (int lane = 0; lane < WARP; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < 4; ++r) a[g + 8 * (r & 1)][q + 4 * (r >> 1)] = value(w.in[lane][r]);
    for (int r = 0; r < 2; ++r) b[q + 4 * r][g] = value(w.in[lane][4 + r]);
  }
  multiply<8>(w, a, b);
}

#include "hopper_engine.h"

void execute(Warp& w) {
  const int warp = static_cast<int>(&w - warps);
  step_on(warp);
  switch (w.operation) {
    case SYNC_WARP:
    case WARP_INDEX:
    case WGMMA_WAIT:
      break;
    case SHUFFLE:
      for (auto lane = 0; lane < WARP; ++lane) w.out[lane][0] = w.in[w.in[lane][1] % WARP][0];
      break;
    case ANY:
    case ALL: {
      uint32_t any = 0, all = 1;
      for (const auto& in : w.in) any |= in[0], all &= in[0];
      for (auto& out : w.out) out[0] = w.operation == ANY ? any : all;
      break;
    }
    case LOAD_MATRIX_X4:
      return load_matrices(w, 4, false);
    case LOAD_MATRIX_X4_TRANSPOSED:
      return load_matrices(w, 4, true);
    case LOAD_MATRIX_X2:
      return load_matrices(w, 2, false);
    case LOAD_MATRIX_X2_TRANSPOSED:
      return load_matrices(w, 2, true);
    case MOVE_MATRIX:
      return move_matrix(w);
    case MMA_BF16:
      return multiply_bf16(w);
    case MMA_HALF:
      return multiply_half(w);
    case MMA_TF32:
      return multiply_tf32(w);
    case BARRIER_ARRIVE:
      return arrive_without_waiting(w);
    case WGMMA:
      return issue_product(w);
    case WGMMA_FENCE:
      multipliers[warp].fenced = true;
      break;
    case WGMMA_COMMIT:
      multipliers[warp].fenced = false;
      ++multipliers[warp].committed;
      break;
    case FENCE_ASYNC:
      memcpy(async_shared.data(), emulator_current.shared, shared_bytes);
      break;
  }
}

// ---- Blocks

void run_block(uint32_t block) {
  emulator_current.block = block;
  memset(shared_pages, CANARY, shared_end - shared_pages);
  memset(emulator_current.shared, POISON, shared_bytes);
  memset(barriers, 0, sizeof barriers);
  for (int i = 0; i < warp_count; ++i) warps[i].ready = ALL_LANES, warps[i].collective = warps[i].barrier = warps[i].exited = 0;
  for (int i = 0; i < thread_count; ++i) {
    threads[i].copies.clear();
    threads[i].committed = 0;
    threads[i].awaited = 0;
    make_context(threads[i].context, stacks + i * (STACK + PAGE) + PAGE, STACK, thread_body);
  }
  reset_hopper();
  reset_races();
  alive = thread_count;
  descending = random_below(2);
  emulator_current.thread = static_cast<int>(random_below(thread_count));
  switch_context(launcher, threads[emulator_current.thread].context);
  check_hopper_at_end();
  const unsigned char* end = emulator_current.shared + shared_bytes;
  for (const unsigned char* p = shared_pages; p < shared_end; ++p)
    if ((p < emulator_current.shared || p >= end) && *p != CANARY)
      emulator_fail("shared memory was written %lld bytes from its start; it has %u", static_cast<long long>(p - emulator_current.shared), shared_bytes);
}

void on_signal(int number, siginfo_t* info, void*) {
  const auto* address = static_cast<const unsigned char*>(info->si_addr);
  const unsigned char* stack_end = stacks + thread_count * (STACK + PAGE);
  if (number == SIGVTALRM) emulator_fail("the launch did not end within its time limit");
  if (number == SIGFPE) emulator_fail("integer division by zero");
  if (number == SIGILL || number == SIGTRAP) emulator_fail("an index outside an array");
  if (address >= stacks && address < stack_end) emulator_fail("stack overflow: more than %llu bytes of local variables", static_cast<unsigned long long>(STACK));
  if (address >= shared_pages - PAGE && address < shared_end + PAGE)
    emulator_fail("access %lld bytes from the start of the %u bytes of shared memory", static_cast<long long>(address - emulator_current.shared), shared_bytes);
  if (address == nullptr) emulator_fail("access to a null pointer, or a vector access that is not aligned");
  emulator_fail("access to address %p, outside every tensor", static_cast<const void*>(address));
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGVTALRM};
constexpr int SIGNAL_COUNT = sizeof SIGNALS / sizeof *SIGNALS;

unsigned char* map_pages(uint64_t bytes, int protection) {
  void* pages = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    perror("emulator: mmap");
    abort();
  }
  return static_cast<unsigned char*>(pages);
}

void prepare_process() {
  if (stacks) return;
  stacks = map_pages(MAX_THREADS * (STACK + PAGE) + PAGE, PROT_READ | PROT_WRITE);
  for (int i = 0; i <= MAX_THREADS; ++i) mprotect(stacks + i * (STACK + PAGE), PAGE, PROT_NONE);
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                            : exponent     ? ldexpf(static_cast<float>(mantissa + 1024), exponent - 25)
                                           : ldexpf(static_cast<float>(mantissa), -24);
    half_values[bits] = bits >> 15 ? -magnitude : magnitude;
  }
}

}  // namespace

extern "C" {

void emulator_fail(const char* format, ...) {
  const int length = snprintf(message, sizeof message, "%s, block %u, thread %d: ", kernel_name, emulator_current.block, emulator_current.thread);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + length, sizeof message - length, format, arguments);
  va_end(arguments);
  siglongjmp(escape, 1);
}

void emulator_collective(Operation operation, const unsigned* in, int in_words, unsigned* out, int out_words) {
  const int lane = emulator_current.thread % WARP;
  Warp& w = this_warp();
  if (w.exited) emulator_fail("%s, but lanes %08x of the warp have exited", NAMES[operation], w.exited);
  if (w.barrier) emulator_fail("%s, while lanes %08x of the warp wait at barrier %d", NAMES[operation], w.barrier, w.barrier_id);
  if (w.collective && w.operation != operation)
    emulator_fail("divergence: %s, while lanes %08x of the warp wait at %s", NAMES[operation], w.collective, NAMES[w.operation]);
  land_sometimes();
  w.operation = operation;
  for (int i = 0; i < in_words; ++i) w.in[lane][i] = in[i];
  w.collective |= 1u << lane;
  if (w.collective == ALL_LANES) {
    execute(w);
    w.collective = 0;
    w.ready = ALL_LANES;
    yield_sometimes();
  } else {
    w.ready &= ~(1u << lane);
    yield_blocked();
  }
  for (int i = 0; i < out_words; ++i) out[i] = w.out[lane][i];
}

void emulator_barrier(int id, int count) {
  Warp& w = this_warp();
  if (w.collective) emulator_fail("barrier %d, while lanes %08x of the warp wait at %s", id, w.collective, NAMES[w.operation]);
  if (w.exited) emulator_fail("barrier %d, but lanes %08x of the warp have exited", id, w.exited);
  if (w.barrier && w.barrier_id != id) emulator_fail("barrier %d, while lanes %08x of the warp wait at barrier %d", id, w.barrier, w.barrier_id);
  if (id < 0 || id >= BARRIERS) emulator_fail("barrier %d: named barriers are 1 to 15", id);
  if (id > 0 && (count <= 0 || count % WARP || count > thread_count)) emulator_fail("barrier %d of %d threads: not a multiple of 32 up to %d", id, count, thread_count);
  Barrier& barrier = barriers[id];
  if (barrier.arrived && barrier.threads != count) emulator_fail("barrier %d of %d threads, while others wait there for %d", id, count, barrier.threads);
  land_sometimes();
  barrier.threads = count;
  barrier.lanes[emulator_current.thread / WARP] |= this_lane_bit();
  w.barrier |= this_lane_bit();
  w.barrier_id = id;
  w.ready &= ~this_lane_bit();
  if (++barrier.arrived == (id == 0 ? alive : count)) {
    release(id);
    yield_sometimes();
  } else {
    yield_blocked();
  }
}

void emulator_copy_async(unsigned shared, const void* global, int bytes, bool valid) {
  unsigned char* target = shared_at(shared, bytes, bytes, "copy_async");
  const auto* source = static_cast<const unsigned char*>(global);
  if (valid && reinterpret_cast<uintptr_t>(source) % bytes) emulator_fail("copy_async: global address %p is not aligned to %d bytes", global, bytes);
  if (valid) {  // an access outside a tensor shows here, in the thread's own turn
    [[maybe_unused]] static volatile unsigned char sink;
    sink = source[0];
    sink = source[bytes - 1];
  }
  if (watched) check_access(shared - SHARED_START, bytes, Access::ISSUE);
  memset(target, POISON, bytes);
  Thread& thread = threads[emulator_current.thread];
  const Copy copy{shared, source, bytes, valid, thread.committed};
  if (!watched && random_below(4) == 0) land(copy);
  else thread.copies.push_back(copy);
}

void emulator_commit_copies() { ++threads[emulator_current.thread].committed; }

void emulator_wait_copies(int pending) {
  Thread& thread = threads[emulator_current.thread];
  size_t i = 0;
  while (i < thread.copies.size()) {
    if (thread.copies[i].group < thread.committed - pending) land_at(thread.copies, i);
    else ++i;
  }
  land_sometimes();
}

void emulator_memory_barrier_init(unsigned shared, int arrivals) {
  auto& state = *reinterpret_cast<MemoryBarrierState*>(shared_at(shared, 8, 8, "memory barrier"));
  if (arrivals < 1 || arrivals >= 1 << 12) emulator_fail("a memory barrier of %d arrivals", arrivals);
  state = {0, static_cast<unsigned>(arrivals), static_cast<unsigned>(arrivals), 0, BARRIER_MAGIC};
}

void emulator_memory_barrier_arrive(unsigned shared, int expected_bytes) {
  MemoryBarrierState& state = memory_barrier(shared);
  if (state.pending == 0) emulator_fail("the memory barrier at byte %u gets more than its %u arrivals in one phase", shared - SHARED_START, static_cast<unsigned>(state.arrivals));
  publish(memory_barrier_clocks[shared], emulator_current.thread / WARP);
  state.bytes += expected_bytes;
  --state.pending;
  finish_phase(shared, state);
  land_sometimes();
  yield_sometimes();
}

void emulator_memory_barrier_wait(unsigned shared, unsigned parity) {
  land_sometimes();
  Thread& thread = threads[emulator_current.thread];
  while (memory_barrier(shared).phase == parity) {
    thread.awaited = shared;
    thread.parity = parity;
    this_warp().ready &= ~this_lane_bit();
    yield_blocked();
  }
  join(clocks[emulator_current.thread / WARP], memory_barrier_clocks[shared]);
}

void emulator_copy_box(unsigned shared, const void* map, unsigned barrier, const int (&at)[5]) {
  BoxCopy copy;
  memcpy(&copy.map, map, sizeof copy.map);
  if (reinterpret_cast<uintptr_t>(map) % 64) emulator_fail("copy_box: the map at %p is not aligned to 64 bytes", map);
  if (copy.map.magic != MAP_MAGIC) emulator_fail("copy_box: the map was not encoded");
  copy.shared = shared;
  copy.barrier = barrier;
  memcpy(copy.at, at, sizeof copy.at);
  memory_barrier(barrier);
  const uint32_t bytes = box_bytes(copy.map);
  memset(shared_at(shared, bytes, 128, "copy_box"), POISON, bytes);
  memset(&async_shared[shared - SHARED_START], POISON, bytes);
  box_copies.push_back(copy);
  land_sometimes();
}

void emulator_reduce_add(float* global, unsigned shared, unsigned bytes) {
  if (bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16) emulator_fail("reduce_add: %u bytes to %p, which are no multiples of 16", bytes, static_cast<void*>(global));
  shared_at(shared, bytes, 16, "reduce_add");
  const volatile float *first = global, *last = global + bytes / 4 - 1;  // an access outside a tensor shows here, in the thread's own turn
  [[maybe_unused]] const float touched = *first + *last;
  reductions.push_back({global, shared, bytes, emulator_current.thread, false});
  land_sometimes();
}

void emulator_commit_reductions() {
  for (Reduction& reduction : reductions) reduction.committed |= reduction.thread == emulator_current.thread;
}

void emulator_wait_reductions() {
  land_sometimes();
  const int thread = emulator_current.thread;
  while (has_reductions(thread)) {
    awaits_reductions[thread] = true;
    this_warp().ready &= ~this_lane_bit();
    yield_blocked();
  }
}

void emulator_wgmma(int n, unsigned flags, float* d, const unsigned* a_registers, unsigned long long a, unsigned long long b) {
  Thread& thread = threads[emulator_current.thread];
  thread.accumulators = d;
  thread.multiplicand = a_registers;
  const unsigned in[6] = {static_cast<unsigned>(a), static_cast<unsigned>(a >> 32), static_cast<unsigned>(b), static_cast<unsigned>(b >> 32), static_cast<unsigned>(n), flags};
  emulator_collective(WGMMA, in, 6, nullptr, 0);
}

void emulator_wgmma_wait(int pending) {
  emulator_collective(WGMMA_WAIT, nullptr, 0, nullptr, 0);
  wait_products(pending);
}

unsigned emulator_shared_address(const void* pointer) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - emulator_current.shared;
  if (offset < 0 || offset > shared_bytes) emulator_fail("shared_address: the pointer is %lld bytes from the start of the %u bytes of shared memory", static_cast<long long>(offset), shared_bytes);
  return static_cast<unsigned>(offset) + SHARED_START;
}

float emulator_half_to_float(unsigned short bits) { return half_values[bits]; }

unsigned short emulator_float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fff;
  if (bits >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (bits >= 0x38800000u) {                                                   // 2^-14: a normal half
    bits -= 0x38000000u;
    return static_cast<unsigned short>(sign | (bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
  }
  // Below, steps are 2^-24: those of a float in [0.5, 1), so that adding 0.5 rounds correctly.
  const float shifted = bits_to_float(bits) + 0.5f;
  memcpy(&bits, &shifted, 4);
  return static_cast<unsigned short>(sign | (bits - 0x3f000000u));
}

// Runs a grid. Returns null, or what went wrong; the text lives until the next launch.
const char* emulator_launch(const char* name, void (*entry)(const void*), const void* arguments, unsigned grid, int block, unsigned shared,
                            unsigned long long seed, int seconds, bool watch_races) {
  prepare_process();
  watched = watch_races;
  kernel_name = name;
  kernel = entry;
  kernel_arguments = arguments;
  thread_count = block;
  warp_count = block / WARP;
  shared_bytes = shared;
  random_state = seed * 0x9e3779b97f4a7c15ull + 0x1234567890abcdefull;
  emulator_current = {0, 0, grid, nullptr};

  // The start is aligned to 1024 bytes, so up to 1023 bytes between the end and the guard page are watched by a canary instead.
  const uint64_t pages = (shared + PAGE - 1) / PAGE * PAGE;
  unsigned char* mapping = map_pages(pages + 2 * PAGE, PROT_NONE);
  shared_pages = mapping + PAGE;
  shared_end = shared_pages + pages;
  if (pages) mprotect(shared_pages, pages, PROT_READ | PROT_WRITE);
  emulator_current.shared = shared_end - (shared + 1023) / 1024 * 1024;

  static unsigned char signal_stack[64 << 10];
  stack_t alternate{}, previous_alternate{};
  alternate.ss_sp = signal_stack;
  alternate.ss_size = sizeof signal_stack;
  sigaltstack(&alternate, &previous_alternate);
  struct sigaction action{}, previous[SIGNAL_COUNT];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < SIGNAL_COUNT; ++i) sigaction(SIGNALS[i], &action, &previous[i]);
  const itimerval limit{{0, 0}, {seconds, 0}}, none{};
  setitimer(ITIMER_VIRTUAL, &limit, nullptr);

  const char* volatile result = nullptr;
  if (sigsetjmp(escape, 1) == 0) {
    const bool reversed = random_below(2);
    for (unsigned i = 0; i < grid; ++i) run_block(reversed ? grid - 1 - i : i);
    check_margins();
  } else {
    result = message;
  }

  setitimer(ITIMER_VIRTUAL, &none, nullptr);
  for (int i = 0; i < SIGNAL_COUNT; ++i) sigaction(SIGNALS[i], &previous[i], nullptr);
  sigaltstack(&previous_alternate, nullptr);
  munmap(mapping, pages + 2 * PAGE);
  return result;
}

// Memory that ends (or begins) at a page nobody may touch, filled with NaN and aligned to 16 bytes.
void* emulator_guarded(unsigned long long bytes, bool at_end) {
  const uint64_t pages = (bytes + PAGE - 1) / PAGE * PAGE;
  unsigned char* mapping = map_pages(pages + 2 * PAGE, PROT_NONE);
  if (pages) mprotect(mapping + PAGE, pages, PROT_READ | PROT_WRITE);
  memset(mapping + PAGE, POISON, pages);
  unsigned char* memory = mapping + PAGE + (at_end ? (pages - bytes) / 16 * 16 : 0);
  margins[memory] = {memory + bytes, at_end ? mapping + PAGE + pages : memory + std::min<uint64_t>(bytes + 64, pages)};
  return memory;
}

void emulator_release(void* memory, unsigned long long bytes) {
  const uint64_t pages = (bytes + PAGE - 1) / PAGE * PAGE;
  const auto address = reinterpret_cast<uintptr_t>(memory) / PAGE * PAGE;
  margins.erase(memory);
  munmap(reinterpret_cast<void*>(address - PAGE), pages + 2 * PAGE);
}

}  // extern "C"

}  // namespace emulator

#include "race_hooks.h"
