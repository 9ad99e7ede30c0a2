// Hopper's asynchronous machinery for engine.cpp, which includes it inside its namespace: memory barriers, tensor copies, wgmma.
//
// Tensor copies land in any order, and in some blocks only when no thread could go on otherwise. Matrix products of a warp run in order,
// after all four warps of the warpgroup have asked for them, in some blocks only at the wait for them; until then their accumulators hold
// NaN, and operands are read when they run, by all four at once: a warp that has waited may give away shared memory for all of them.
//
// The matrix units and reductions see shared memory through a copy of it, which tensor copies write, and ordinary stores only by a fence. A
// reduction reads it, and adds to global memory, at any moment until its thread has waited, in some blocks only when no thread could go on.

bool eager;  // whether asynchronous work of this block may be done before somebody waits for it
std::vector<unsigned char> async_shared;

// ---- Memory barriers: the state lies in the 8 bytes of shared memory that the kernel gives it

constexpr unsigned BARRIER_MAGIC = 0x2d5b;

struct MemoryBarrierState {
  int64_t bytes : 24;  // still to come; negative where they came before they were announced
  uint64_t pending : 12, arrivals : 12, phase : 1, magic : 15;
};
static_assert(sizeof(MemoryBarrierState) == 8, "");

MemoryBarrierState& memory_barrier(uint32_t address) {
  auto& state = *reinterpret_cast<MemoryBarrierState*>(shared_at(address, 8, 8, "memory barrier"));
  if (state.magic != BARRIER_MAGIC) emulator_fail("the memory barrier at byte %u was not initialised, or was overwritten", address - SHARED_START);
  return state;
}

void finish_phase(uint32_t address, MemoryBarrierState& state) {
  if (state.pending != 0 || state.bytes != 0) return;
  state.phase ^= 1;
  state.pending = state.arrivals;
  for (int i = 0; i < thread_count; ++i) {
    if (threads[i].awaited != address || threads[i].parity == state.phase) continue;
    threads[i].awaited = 0;
    warps[i / WARP].ready |= 1u << (i % WARP);
  }
}

// ---- Tensor copies

// What EmulatorRuntime.encode_tensor_map writes.
struct PlainMap {
  uint64_t address, magic;
  uint64_t strides[4];  // bytes, dimensions 1 to 4
  uint32_t sizes[5], box[5], steps[5];
  uint32_t swizzle, element_bytes;
};
constexpr uint64_t MAP_MAGIC = 0x70616d726f736e65;

struct BoxCopy {
  PlainMap map;
  uint32_t shared, barrier;
  int at[5];
};
std::vector<BoxCopy> box_copies;

uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return row_bytes < 32 ? address : address ^ ((address >> 7 & (row_bytes / 16 - 1)) << 4);
}

uint32_t box_bytes(const PlainMap& map) {
  uint32_t bytes = map.element_bytes;
  for (const uint32_t side : map.box) bytes *= side;
  return bytes;
}

void land(const BoxCopy& copy) {
  const PlainMap& map = copy.map;
  const uint32_t* box = map.box;
  const uint32_t rows = box[1] * box[2] * box[3] * box[4], row_bytes = box[0] * map.element_bytes;
  for (uint32_t row = 0; row < rows; ++row) {
    uint32_t rest = row;
    bool inside = true;
    const auto* source = reinterpret_cast<const unsigned char*>(map.address);
    for (int i = 1; i < 5; ++i) {
      const int64_t position = copy.at[i] + static_cast<int64_t>(rest % box[i]) * map.steps[i];
      rest /= box[i];
      inside &= position >= 0 && position < map.sizes[i];
      source += position * static_cast<int64_t>(map.strides[i - 1]);
    }
    for (uint32_t element = 0; element < box[0]; ++element) {
      const int64_t position = static_cast<int64_t>(copy.at[0]) + element;
      const uint32_t address = swizzled(copy.shared + row * row_bytes + element * map.element_bytes, map.swizzle) - SHARED_START;
      unsigned char value[4] = {};
      if (inside && position >= 0 && position < map.sizes[0]) memcpy(value, source + position * map.element_bytes, map.element_bytes);
      memcpy(emulator_current.shared + address, value, map.element_bytes);
      memcpy(&async_shared[address], value, map.element_bytes);
    }
  }
  MemoryBarrierState& state = memory_barrier(copy.barrier);
  state.bytes -= box_bytes(map);
  finish_phase(copy.barrier, state);
}

// Lands one copy that is under way; false where none is.
bool land_a_box() {
  if (box_copies.empty()) return false;
  std::swap(box_copies[random_below(static_cast<uint32_t>(box_copies.size()))], box_copies.back());
  const BoxCopy copy = box_copies.back();
  box_copies.pop_back();
  land(copy);
  return true;
}

// ---- Reductions from shared to global memory

struct Reduction {
  float* global;
  uint32_t shared, bytes;
  int thread;
  bool committed;
};
std::vector<Reduction> reductions;
bool awaits_reductions[MAX_THREADS];

bool has_reductions(int thread) {
  for (const Reduction& reduction : reductions)
    if (reduction.thread == thread && reduction.committed) return true;
  return false;
}

// Carries out one that is under way; false where none is.
bool land_a_reduction() {
  if (reductions.empty()) return false;
  std::swap(reductions[random_below(static_cast<uint32_t>(reductions.size()))], reductions.back());
  const Reduction found = reductions.back();
  reductions.pop_back();
  for (uint32_t at = 0; at < found.bytes; at += 4) {
    float value;
    memcpy(&value, &async_shared[found.shared - SHARED_START + at], 4);
    found.global[at / 4] += value;
  }
  if (awaits_reductions[found.thread] && !has_reductions(found.thread)) {
    awaits_reductions[found.thread] = false;
    warps[found.thread / WARP].ready |= 1u << (found.thread % WARP);
  }
  return true;
}

// ---- Matrix products

struct Product {
  bool is_half, accumulate, transposed, from_registers, a_transposed;
  int n, index, group;
  uint64_t a, b;
  float* d[WARP];
  const uint32_t* registers[WARP];  // of a
};

struct Accumulators {
  float* d[WARP];
  int n, pending;
  std::vector<float> values;  // [lane][n / 2]
};

struct Multiplier {
  std::vector<Product> products;
  std::vector<Accumulators> accumulators;
  int issued = 0, committed = 0;
  uint32_t waiting = 0;  // lanes, for the other warps of the warpgroup
  bool fenced = false;
  uint64_t history = 0;  // of all products, as a hash
};
Multiplier multipliers[MAX_THREADS / WARP];

const float POISONED = [] {
  float value;
  memset(&value, POISON, sizeof value);
  return value;
}();

struct Descriptor {
  uint32_t start, leading, stride, row_bytes;
};

Descriptor decode(uint64_t bits) {
  const auto field = [&](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; };
  const int mode = static_cast<int>(bits >> 62);
  if (mode == 0) emulator_fail("wgmma: a descriptor without swizzle");
  if (bits >> 49 & 7) emulator_fail("wgmma: a descriptor with a base offset");
  const Descriptor result{field(0), field(16), field(32), 256u >> mode};
  if (result.start >> 7 & (result.row_bytes / 16 - 1)) emulator_fail("wgmma: operand at %#x is not aligned to 8 rows of %u bytes", result.start, result.row_bytes);
  return result;
}

// 8 neighbouring elements: of row `row` from column `column` (a multiple of 8) of the stored matrix of `operand`.
// Along rows, groups of 8 are `stride` bytes apart; along columns, what exceeds a row of swizzled bytes is `leading` bytes further.
const unsigned char* eight_elements(const Descriptor& operand, uint32_t row, uint32_t column) {
  const uint32_t per_row = operand.row_bytes / 2;
  const uint32_t address = operand.start + row / 8 * operand.stride + row % 8 * operand.row_bytes + column / per_row * operand.leading + column % per_row * 2;
  shared_at(address & ~15u, 16, 16, "wgmma");
  return &async_shared[swizzled(address, operand.row_bytes) - SHARED_START];
}

template <class Value>
inline __attribute__((always_inline)) void run_product(const Product& product, int warp_in_group, float* values, Value value) {
  float a[16][16], b[16][256];
  if (product.from_registers) {
    for (int lane = 0; lane < WARP; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int r = 0; r < 4; ++r) {
        const uint32_t pair = product.registers[lane][r];
        a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1)] = value(pair & 0xffffu);
        a[g + 8 * (r & 1)][2 * q + 8 * (r >> 1) + 1] = value(pair >> 16);
      }
    }
  } else if (product.a_transposed) {
    const Descriptor operand = decode(product.a);
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; row += 8) {
        uint16_t bits[8];
        memcpy(bits, eight_elements(operand, k, warp_in_group * 16 + row), 16);
        for (int i = 0; i < 8; ++i) a[row + i][k] = value(bits[i]);
      }
    }
  } else {
    const Descriptor operand = decode(product.a);
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < 16; k += 8) {
        uint16_t bits[8];
        memcpy(bits, eight_elements(operand, warp_in_group * 16 + row, k), 16);
        for (int i = 0; i < 8; ++i) a[row][k + i] = value(bits[i]);
      }
    }
  }
  const Descriptor operand = decode(product.b);
  uint16_t bits[8];
  if (product.transposed) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < product.n; n += 8) {
        memcpy(bits, eight_elements(operand, k, n), 16);
        for (int i = 0; i < 8; ++i) b[k][n + i] = value(bits[i]);
      }
    }
  } else {
    for (int n = 0; n < product.n; ++n) {
      for (int k = 0; k < 16; k += 8) {
        memcpy(bits, eight_elements(operand, n, k), 16);
        for (int i = 0; i < 8; ++i) b[k + i][n] = value(bits[i]);
      }
    }
  }
  for (int n = 0; n < product.n; n += 8) {
    Row columns[16];
    for (int k = 0; k < 16; ++k) memcpy(&columns[k], &b[k][n], sizeof(Row));
    for (int row = 0; row < 16; ++row) {
      Row sum = {};
      for (int k = 0; k < 16; ++k) sum += a[row][k] * columns[k];
      float sums[8];
      memcpy(sums, &sum, sizeof sums);
      for (int i = 0; i < 8; ++i) {
        float& d = values[(row % 8 * 4 + i / 2) * (product.n / 2) + n / 2 + row / 8 * 2 + i % 2];
        d = (product.accumulate ? d : 0.0f) + sums[i];
      }
    }
  }
}
FOR_THIS_CPU void run_bf16_product(const Product& product, int warp_in_group, float* values) {
  run_product(product, warp_in_group, values, [](uint32_t bits) { return bits_to_float(bits << 16); });
}
FOR_THIS_CPU void run_half_product(const Product& product, int warp_in_group, float* values) {
  run_product(product, warp_in_group, values, [](uint32_t bits) { return half_values[bits]; });
}

// A warp's 16 rows of its oldest product; hands the accumulators back where no other product is under way on them.
void run_rows_of_product(int warp) {
  Multiplier& unit = multipliers[warp];
  const Product product = unit.products.front();
  unit.products.erase(unit.products.begin());
  for (size_t i = 0; i < unit.accumulators.size(); ++i) {
    Accumulators& found = unit.accumulators[i];
    if (found.d[0] != product.d[0]) continue;
    (product.is_half ? run_half_product : run_bf16_product)(product, warp % 4, found.values.data());
    if (--found.pending > 0) return;
    for (int lane = 0; lane < WARP; ++lane) {
      for (int j = 0; j < found.n / 2; ++j)
        if (memcmp(&found.d[lane][j], &POISONED, sizeof(float)) != 0) emulator_fail("the kernel wrote accumulator %d of lane %d during a matrix product", j, lane);
      memcpy(found.d[lane], &found.values[lane * (found.n / 2)], found.n / 2 * sizeof(float));
    }
    unit.accumulators.erase(unit.accumulators.begin() + i);
    return;
  }
}

// All lanes have asked for the product that their threads describe.
void issue_product(Warp& w) {
  const int warp = static_cast<int>(&w - warps);
  Multiplier& unit = multipliers[warp];
  if (warp_count % 4) emulator_fail("wgmma in a block of %d warps", warp_count);
  if (!unit.fenced) emulator_fail("wgmma without wgmma_fence since the last commit");
  const uint32_t* in = w.in[0];
  Product product{};
  product.a = in[0] | static_cast<uint64_t>(in[1]) << 32;
  product.b = in[2] | static_cast<uint64_t>(in[3]) << 32;
  product.n = static_cast<int>(in[4]);
  product.is_half = in[5] & IS_HALF;
  product.accumulate = in[5] & ACCUMULATE;
  product.transposed = in[5] & TRANSPOSED;
  product.from_registers = in[5] & FROM_REGISTERS;
  product.a_transposed = in[5] & TRANSPOSED_A;
  product.index = unit.issued++;
  product.group = unit.committed;
  for (int lane = 0; lane < WARP; ++lane) {
    if (memcmp(w.in[lane], w.in[0], sizeof w.in[0]) != 0) emulator_fail("wgmma: the lanes of a warp differ in its operands");
    product.d[lane] = threads[warp * WARP + lane].accumulators;
    product.registers[lane] = threads[warp * WARP + lane].multiplicand;
  }
  for (const uint32_t word : w.in[0]) unit.history = (unit.history ^ word) * 0x9e3779b97f4a7c15ull;
  decode(product.b);
  if (!product.from_registers) decode(product.a);
  Accumulators* found = nullptr;
  for (Accumulators& candidate : unit.accumulators)
    if (candidate.d[0] == product.d[0]) found = &candidate;
  if (!found) {
    unit.accumulators.push_back({{}, product.n, 0, std::vector<float>(WARP * product.n / 2)});
    found = &unit.accumulators.back();
    for (int lane = 0; lane < WARP; ++lane) {
      found->d[lane] = product.d[lane];
      memcpy(&found->values[lane * (product.n / 2)], product.d[lane], product.n / 2 * sizeof(float));
      for (int j = 0; j < product.n / 2; ++j) product.d[lane][j] = POISONED;
    }
  }
  if (found->n != product.n) emulator_fail("wgmma: the same accumulators in products of %d and %d columns", found->n, product.n);
  ++found->pending;
  unit.products.push_back(product);
  for (int i = warp / 4 * 4; i < warp / 4 * 4 + 4; ++i) {
    warps[i].ready |= multipliers[i].waiting;
    multipliers[i].waiting = 0;
  }
}

// Whether all warps of the warpgroup have asked for the warp's oldest product.
bool runnable(int warp) {
  for (int i = warp / 4 * 4; i < warp / 4 * 4 + 4; ++i)
    if (multipliers[i].issued <= multipliers[warp].products.front().index) return false;
  return true;
}

void run_oldest_product(int warp) {
  for (int i = warp / 4 * 4; i < warp / 4 * 4 + 4; ++i) run_rows_of_product(i);
}

void wait_products(int pending) {
  Warp& w = this_warp();
  const int warp = static_cast<int>(&w - warps);
  Multiplier& unit = multipliers[warp];
  while (!unit.products.empty() && unit.products.front().group < unit.committed - pending) {
    if (runnable(warp)) {
      run_oldest_product(warp);
    } else {
      unit.waiting |= this_lane_bit();
      w.ready &= ~this_lane_bit();
      yield_blocked();
    }
  }
}

// ---- Blocks

// What threads wait for besides barriers of threads.
int describe_hopper_waits(char* text, int size) {
  int length = 0;
  for (int i = 0; i < thread_count && length < size - 120; ++i) {
    const Thread& thread = threads[i];
    if (!thread.awaited) continue;
    bool first = true;
    for (int j = i / WARP * WARP; j < i; ++j) first &= threads[j].awaited != thread.awaited || threads[j].parity != thread.parity;
    if (!first) continue;
    const MemoryBarrierState& state = memory_barrier(thread.awaited);
    length += snprintf(text + length, size - length, " warp %d waits for parity %u at byte %u (%u arrivals and %d bytes to come);", i / WARP,
                       thread.parity, thread.awaited - SHARED_START, static_cast<unsigned>(state.pending), static_cast<int>(state.bytes));
  }
  for (int warp = 0; warp < warp_count && length < size - 120; ++warp)
    if (multipliers[warp].waiting) length += snprintf(text + length, size - length, " warp %d waits for its warpgroup to multiply;", warp);
  return length;
}

void reset_hopper() {
  eager = random_below(2) == 0;
  async_shared.assign(emulator_current.shared, emulator_current.shared + shared_bytes);
  box_copies.clear();
  reductions.clear();
  memset(awaits_reductions, 0, sizeof awaits_reductions);
  for (int i = 0; i < warp_count; ++i) multipliers[i] = {};
}

void work_ahead() {
  if (!eager) return;
  if (random_below(64) == 0) land_a_box();
  if (random_below(64) == 0) land_a_reduction();
  const int warp = emulator_current.thread / WARP;
  if (!multipliers[warp].products.empty() && random_below(64) == 0 && runnable(warp)) run_oldest_product(warp);
}

void check_hopper_at_end() {
  if (!box_copies.empty()) emulator_fail("the block ends while %zu tensor copies are under way", box_copies.size());
  if (!reductions.empty()) emulator_fail("the block ends while %zu reductions read its shared memory", reductions.size());
  for (int warp = 0; warp < warp_count; ++warp) {
    if (!multipliers[warp].products.empty()) emulator_fail("warp %d ends while its matrix products are under way", warp);
    if (multipliers[warp].history != multipliers[warp / 4 * 4].history) emulator_fail("warps %d and %d of a warpgroup multiplied different matrices", warp / 4 * 4, warp);
  }
}
