// The Python face of the CPU's kernels: addresses and strides in, nothing checked but what memory safety needs.
//
// moe_lightning.kernels.cpu_kernels checks tensors; it passes addresses because that takes a tenth of the time that
// a tensor protocol does.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "cpu.h"

namespace nb = nanobind;
using namespace moe::cpu;

namespace {

using Rows = std::tuple<uintptr_t, int64_t>;              // address, stride
using Blocks = std::tuple<uintptr_t, int64_t, int64_t>;   // address, stride, number
using Tables = std::tuple<uintptr_t, int64_t, int64_t>;   // address, stride, blocks of each sequence
using Lengths = std::tuple<uintptr_t, uintptr_t, int64_t>;  // addresses of context and query lengths, sequences
using Geometry = std::tuple<int64_t, int, int, int, int>;  // tokens, heads, KV heads, head_dim, block size
using Options = std::tuple<float, float, int64_t, uintptr_t>;  // scale, soft-cap, window, address of sinks

using Routes = std::tuple<uintptr_t, uintptr_t, int64_t, int>;  // addresses of ids and weights, tokens, top_k
using Pages = std::tuple<std::vector<uintptr_t>, int>;           // addresses, of them those of an expert

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void run(Cpu& self, int dtype, Rows out, Rows q, Rows k, Rows v, Blocks cache, Tables tables, Lengths lengths,
         Geometry geometry, Options options) {
  Call call{};
  call.dtype = static_cast<DType>(dtype);
  call.out = pointer<void>(std::get<0>(out));
  call.out_stride = std::get<1>(out);
  call.q = pointer<const void>(std::get<0>(q));
  call.q_stride = std::get<1>(q);
  call.k = pointer<const void>(std::get<0>(k));
  call.k_stride = std::get<1>(k);
  call.v = pointer<const void>(std::get<0>(v));
  call.v_stride = std::get<1>(v);
  call.cache = pointer<void>(std::get<0>(cache));
  call.block_stride = std::get<1>(cache);
  call.num_blocks = std::get<2>(cache);
  Batch& batch = call.batch;
  batch.block_tables = pointer<const int64_t>(std::get<0>(tables));
  batch.table_stride = std::get<1>(tables);
  batch.max_blocks = std::get<2>(tables);
  batch.context_lens = pointer<const int64_t>(std::get<0>(lengths));
  batch.query_lens = pointer<const int64_t>(std::get<1>(lengths));
  batch.num_seqs = std::get<2>(lengths);
  std::tie(batch.num_tokens, call.num_heads, call.num_kv_heads, call.head_dim, batch.block_size) = geometry;
  call.scale = std::get<0>(options);
  call.soft_cap = std::get<1>(options);
  batch.window = std::get<2>(options);
  call.sinks = pointer<const float>(std::get<3>(options));
  nb::gil_scoped_release release;
  self.run(call);
}

void experts(Cpu& self, int dtype, Rows out, Rows x, Routes routes, Pages pages, std::tuple<int, int> sizes) {
  ExpertsCall call{};
  call.dtype = static_cast<DType>(dtype);
  call.out = pointer<void>(std::get<0>(out));
  call.out_stride = std::get<1>(out);
  call.x = pointer<const void>(std::get<0>(x));
  call.x_stride = std::get<1>(x);
  call.ids = pointer<const int64_t>(std::get<0>(routes));
  call.weights = pointer<const float>(std::get<1>(routes));
  std::tie(std::ignore, std::ignore, call.num_tokens, call.top_k) = routes;
  std::vector<const void*> addresses;
  for (const uintptr_t address : std::get<0>(pages)) addresses.push_back(pointer<const void>(address));
  call.pages = addresses.data();
  call.pages_per_expert = std::get<1>(pages);
  call.num_experts = static_cast<int>(addresses.size()) / call.pages_per_expert;
  std::tie(call.hidden, call.rows) = sizes;
  nb::gil_scoped_release release;
  self.run(call);
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa isa : available_isas()) names.emplace_back(isa_name(isa));
  return names;
}

}  // namespace

NB_MODULE(_cpu_kernels, m) {
  // A lane's thread may hold a kernel until the process ends, which is no leak.
  nb::set_leak_warnings(false);
  m.def("available_isas", &isa_names);
  nb::class_<Cpu>(m, "Cpu")
      .def("__init__",
           [](Cpu* self, int num_threads, std::vector<int> cpus, const std::string& isa) {
             new (self) Cpu(num_threads, std::move(cpus), isa_from_name(isa));
           })
      .def("run", &run)
      .def("experts", &experts)
      .def("read",
           [](Cpu& self, uintptr_t from, int64_t bytes) {
             nb::gil_scoped_release release;
             return self.read(pointer<const void>(from), bytes);
           })
      .def_prop_ro("experts_bytes", &Cpu::experts_bytes)
      .def_prop_ro("num_threads", &Cpu::num_threads)
      .def_prop_ro("isa", [](const Cpu& self) { return isa_name(self.isa()); });
}
