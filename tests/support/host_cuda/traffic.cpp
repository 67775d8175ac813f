// Global and shared memory traffic: checked, and counted in sectors and wavefronts; see runtime.h.
#include "traffic.h"

#include <algorithm>

#include "runtime.h"

namespace host_cuda {
namespace {

Statistics stats;

}  // namespace

int counted_phase = 0;

Statistics& statistics() {
  return stats;
}

void clear_tensors() {
  stats = Statistics();
}

void register_tensor(const char* name, const void* begin, size_t bytes, bool writable) {
  auto address = reinterpret_cast<uintptr_t>(begin);
  stats.tensors.push_back({name, address, address + bytes, writable, {}, {}});
}

namespace {
Tensor* find_tensor(uintptr_t address) {
  static size_t hint = 0;
  auto& all = stats.tensors;
  if (hint < all.size() && address >= all[hint].begin && address < all[hint].end) return &all[hint];
  for (hint = 0; hint < all.size(); hint++) {
    if (address >= all[hint].begin && address < all[hint].end) return &all[hint];
  }
  return nullptr;
}
}  // namespace

void check_global(const void* pointer, uint32_t bytes, bool write) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  const Tensor* tensor = find_tensor(address);
  if (!tensor || address + bytes > tensor->end) {
    std::string near;
    for (const Tensor& t : stats.tensors) {
      if (address + 65536 > t.begin && address < t.end + 65536) {
        near += "; byte " + std::to_string(static_cast<int64_t>(address - t.begin)) + " of the " +
                std::to_string(t.end - t.begin) + " of " + t.name;
      }
    }
    fail("global memory: " + std::to_string(bytes) + " bytes outside of every tensor" + near);
  }
  if (address % bytes)
    fail("global memory: misaligned " + std::to_string(bytes) + "-byte access to " + tensor->name);
  if (write && !tensor->writable) fail("global memory: write to the input " + tensor->name);
}

// Lanes mostly ask for ascending addresses: what lies above all that has been seen is new without a search.
void count_global(const Access* lanes, uint32_t mask, bool store) {
  uintptr_t sector[64], place[32], highest_sector = 0, highest_place = 0;
  int sectors = 0, places = 0;
  uint64_t bytes = 0;
  Tensor* tensor = nullptr;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const Access& a = lanes[__builtin_ctz(rest)];
    if (!a.bytes) continue;
    if (!tensor) tensor = find_tensor(a.address);
    if (a.address <= highest_place && std::find(place, place + places, a.address) != place + places) continue;
    highest_place = std::max(highest_place, a.address);
    place[places++] = a.address;
    bytes += a.bytes;
    for (uintptr_t s = a.address / 32; s <= (a.address + a.bytes - 1) / 32; s++) {
      if (s <= highest_sector && std::find(sector, sector + sectors, s) != sector + sectors) continue;
      highest_sector = std::max(highest_sector, s);
      sector[sectors++] = s;
    }
  }
  if (!tensor) return;
  Traffic& traffic = (store ? tensor->store : tensor->load)[counted_phase];
  traffic.requests++;
  traffic.sectors += static_cast<uint64_t>(sectors);
  traffic.bytes += bytes;
}

namespace {
// Wavefronts of one part of a request: the most distinct words that any bank has to deliver.
int wavefronts(const Access* lanes, uint32_t mask, uint32_t bytes) {
  uint32_t taken = 0;  // banks; as long as no two lanes meet in one, there is nothing to search
  bool meet = false;
  for (uint32_t rest = mask; rest && !meet; rest &= rest - 1) {
    const uint32_t bank = static_cast<uint32_t>(lanes[__builtin_ctz(rest)].address / 4 % 32);
    const uint32_t banks =
        bytes <= 4 ? 1u << bank : (bytes == 8 ? 3u : 15u) << bank;  // wide ones are aligned
    meet = taken & banks;
    taken |= banks;
  }
  if (!meet) return 1;
  uintptr_t words[32][32];
  int count[32]{}, most = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const uintptr_t address = lanes[__builtin_ctz(rest)].address;
    for (uintptr_t w = address / 4; w <= (address + bytes - 1) / 4; w++) {
      const int bank = static_cast<int>(w % 32);
      if (std::find(words[bank], words[bank] + count[bank], w) != words[bank] + count[bank]) continue;
      words[bank][count[bank]++] = w;
      most = std::max(most, count[bank]);
    }
  }
  return most;
}
}  // namespace

// 16-byte accesses are served in quarters of a warp, 8-byte ones in halves; within a part each of the 32
// banks delivers one 4-byte word per wavefront, and equal words are broadcast.
void count_shared(const Access* lanes, uint32_t mask, uint32_t bytes) {
  const int part = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
  SharedTraffic& traffic = stats.shared[counted_phase];
  for (int start = 0; start < 32; start += part) {
    const uint32_t lanes_of_part = mask & (part == 32 ? ~0u : ((1u << part) - 1) << start);
    if (!lanes_of_part) continue;
    traffic.wavefronts++;
    traffic.conflicts += static_cast<uint64_t>(wavefronts(lanes, lanes_of_part, bytes) - 1);
  }
}

}  // namespace host_cuda
