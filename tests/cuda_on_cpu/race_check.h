// Races on shared memory for engine.cpp, which includes it inside its namespace: two accesses to the same bytes, one of them a write, by
// lanes that have not synchronised in between. Found whatever order the warps happened to run in.
//
// The kernel is compiled with g++'s thread sanitizer, but linked without its library: every load and store calls a function below. Warps
// keep vector clocks (as FastTrack, Flanagan and Freund, PLDI 2009), joined at barriers; lanes of a warp are in step after any collective.
// An asynchronous copy writes when it is issued, and again when it has been waited for; nobody may touch its bytes in between. Tensor
// copies and wgmma are not watched here: hopper_engine.h has checks of its own.

bool watched;  // whether this launch is checked

constexpr int CELL = 2;  // bytes
constexpr int SEVERAL = -1;

struct Cell {
  uint32_t written, write_step, read_step;  // clock of the writing warp; steps of the last write and read
  uint32_t read[MAX_THREADS / WARP];        // clock of each warp's last read
  uint32_t block;                           // `blocks_run` in which the rest means something
  short writer, reader;                     // threads; the reader is SEVERAL where a step had more than one
  bool pending;                             // a copy is under way
};
Cell cells[(1 << 18) / CELL];

struct Clock {
  uint32_t of[MAX_THREADS / WARP];  // what is known to have happened, of each warp; its own entry is the present
};
Clock clocks[MAX_THREADS / WARP];
Clock meeting[BARRIERS];  // of the warps that have arrived
std::map<uint32_t, Clock> memory_barrier_clocks;
uint32_t steps[MAX_THREADS / WARP], last_step, blocks_run;

void join(Clock& into, const Clock& from) {
  for (int warp = 0; warp < warp_count; ++warp) into.of[warp] = std::max(into.of[warp], from.of[warp]);
}

void reset_races() {
  ++blocks_run;
  memory_barrier_clocks.clear();
  memset(clocks, 0, sizeof clocks);
  memset(meeting, 0, sizeof meeting);
  for (int warp = 0; warp < warp_count; ++warp) clocks[warp].of[warp] = 1, steps[warp] = ++last_step;
}

void step_on(int warp) { steps[warp] = ++last_step; }

// What the warp did so far happened before what others do once they have met it.
void publish(Clock& clock, int warp) {
  join(clock, clocks[warp]);
  ++clocks[warp].of[warp];
  step_on(warp);
}

void report_race(const char* what, int other, uint32_t cell) {
  emulator_fail("race: %s thread %d at byte %u of shared memory, and no %s is in between", what, other, cell * CELL,
                other / WARP == emulator_current.thread / WARP ? "collective of the warp" : "barrier");
}

enum class Access { READ, WRITE, ISSUE, LAND };

void check_access(uint32_t offset, uint32_t bytes, Access access) {
  const int thread = emulator_current.thread, warp = thread / WARP;
  const Clock& clock = clocks[warp];
  for (uint32_t at = offset / CELL; at * CELL < offset + bytes; ++at) {
    Cell& cell = cells[at];
    if (cell.block != blocks_run) cell = {0, 0, 0, {}, blocks_run, 0, 0, false};
    if (cell.pending && access != Access::LAND) report_race("the asynchronous copy has not been waited for by", cell.writer, at);
    const int writer = cell.writer, other = writer / WARP;
    if (other != warp ? cell.written > clock.of[other] : cell.write_step == steps[warp] && writer != thread)
      report_race(access == Access::READ ? "reads what was written by" : "writes what was written by", writer, at);
    if (access == Access::READ) {
      cell.reader = static_cast<short>(cell.read_step == steps[warp] && cell.reader != thread ? SEVERAL : thread);
      cell.read_step = steps[warp];
      cell.read[warp] = clock.of[warp];
      continue;
    }
    for (int v = 0; v < warp_count; ++v)
      if (v != warp && cell.read[v] > clock.of[v]) report_race("writes what is read by", v * WARP, at);
    if (cell.read_step == steps[warp] && cell.reader != thread) report_race("writes what is read by", cell.reader == SEVERAL ? thread ^ 1 : cell.reader, at);
    cell.written = clock.of[warp];
    cell.write_step = steps[warp];
    cell.writer = static_cast<short>(thread);
    cell.pending = access == Access::ISSUE;
  }
}

void watch(const void* pointer, uint32_t bytes, Access access) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - emulator_current.shared;
  if (watched && offset >= 0 && offset + bytes <= shared_bytes) check_access(static_cast<uint32_t>(offset), bytes, access);
}
