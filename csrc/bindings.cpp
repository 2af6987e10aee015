// Python module fpsattention._C: planner, block lists, build info. NumPy in, NumPy out; knows nothing of torch.
// python/fpsattention/_C.pyi has the signatures; layout/ is the public face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>

#include "fpsattn/block_mask.h"
#include "fpsattn/status.h"
#include "fpsattn/tile_layout.h"

#if defined(__clang__)
#define FPSATTN_COMPILER "clang " __clang_version__
#else
#define FPSATTN_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;

namespace {

using fpsattn::Int3;
using Int32Array = py::array_t<int32_t, py::array::c_style>;
using BoolArray = py::array_t<bool, py::array::c_style>;

Int32Array to_numpy(const std::vector<int32_t>& values, const std::vector<py::ssize_t>& shape) {
  Int32Array array(shape);
  if (!values.empty()) std::memcpy(array.mutable_data(), values.data(), values.size() * sizeof(int32_t));
  return array;
}

Int32Array to_numpy(const std::vector<int32_t>& values) {
  return to_numpy(values, {static_cast<py::ssize_t>(values.size())});
}

// Runs host work on plain data while other Python threads go on.
template <typename Work>
auto without_gil(const Work& work) {
  const py::gil_scoped_release unlocked;
  return work();
}

py::tuple to_tuple(const Int3& v) { return py::make_tuple(v[0], v[1], v[2]); }

fpsattn::TextPosition text_position_of(const std::string& name) {
  if (name == "none") return fpsattn::TextPosition::kNone;
  if (name == "suffix") return fpsattn::TextPosition::kSuffix;
  if (name == "prefix") return fpsattn::TextPosition::kPrefix;
  FPSATTN_CHECK(false, "plan: text_position '", name, "', expected 'suffix', 'prefix' or 'none'");
  return fpsattn::TextPosition::kNone;
}

py::dict plan(const Int3& grid, const std::optional<Int3>& tile, int64_t text_len, const std::string& text_position) {
  const fpsattn::TileLayout layout =
      without_gil([&] { return fpsattn::plan(grid, tile, text_len, text_position_of(text_position)); });
  py::dict result;
  result["grid"] = to_tuple(layout.grid);
  result["tile"] = to_tuple(layout.tile);
  result["tile_grid"] = to_tuple(layout.tile_grid);
  result["tile_sizes"] =
      py::make_tuple(py::tuple(py::cast(layout.tile_sizes[0])), py::tuple(py::cast(layout.tile_sizes[1])),
                     py::tuple(py::cast(layout.tile_sizes[2])));
  result["text_len"] = layout.text_len;
  result["text_position"] = text_position;
  result["num_tokens"] = layout.num_tokens;
  result["num_tiles"] = layout.num_tiles;
  result["num_blocks"] = layout.num_blocks;
  result["num_slots"] = layout.num_slots;
  result["token_of_slot"] = to_numpy(layout.token_of_slot);
  result["slot_of_token"] = to_numpy(layout.slot_of_token);
  result["tile_of_block"] = to_numpy(layout.tile_of_block);
  result["tile_block_offsets"] = to_numpy(layout.tile_block_offsets);
  result["tile_tokens"] = to_numpy(layout.tile_tokens);
  return result;
}

// (num_blocks [batch, heads, rows], indices [batch, heads, rows, width])
py::tuple to_numpy(const fpsattn::BlockListTable& table, py::ssize_t batch, py::ssize_t heads) {
  const py::ssize_t rows = table.rows;
  return py::make_tuple(to_numpy(table.num_blocks, {batch, heads, rows}),
                        to_numpy(table.indices, {batch, heads, rows, static_cast<py::ssize_t>(table.width)}));
}

int64_t num_tiles_of(const Int32Array& offsets) {
  FPSATTN_CHECK(offsets.ndim() == 1 && offsets.size() >= 2, "BlockMask: tile_block_offsets must be [num_tiles + 1]");
  return offsets.size() - 1;
}

fpsattn::BlockListView view_of(const Int32Array& num_blocks, const Int32Array& indices) {
  FPSATTN_CHECK(num_blocks.ndim() == 3 && indices.ndim() == 4,
                "BlockMask: kv_num_blocks must be [Bm, Hm, rows], kv_indices [Bm, "
                "Hm, rows, max_kv]");
  for (int axis = 0; axis < 3; ++axis) {
    FPSATTN_CHECK(num_blocks.shape(axis) == indices.shape(axis),
                  "BlockMask: kv_num_blocks and kv_indices differ along axis ", axis);
  }
  return {num_blocks.data(),   indices.data(),      num_blocks.shape(0),
          num_blocks.shape(1), num_blocks.shape(2), indices.shape(3)};
}

py::tuple sliding_tile_lists(const Int3& tile_grid, const Int32Array& offsets, const Int3& window) {
  const int64_t num_tiles = num_tiles_of(offsets);
  FPSATTN_CHECK(int64_t{tile_grid[0]} * tile_grid[1] * tile_grid[2] <= num_tiles,
                "sliding_tile_mask: more tiles in tile_grid than in tile_block_offsets");
  const int32_t* first_block = offsets.data();
  return to_numpy(without_gil([&] { return fpsattn::sliding_tile_lists(tile_grid, first_block, num_tiles, window); }),
                  1, 1);
}

py::tuple lists_from_matrix(const Int32Array& offsets, const BoolArray& mask) {
  const int64_t num_tiles = num_tiles_of(offsets);
  const int64_t num_blocks = offsets.data()[num_tiles];
  FPSATTN_CHECK(
      mask.ndim() == 4 && mask.shape(2) == num_tiles && (mask.shape(3) == num_tiles || mask.shape(3) == num_blocks),
      "BlockMask: mask must be [Bm, Hm, num_tiles, num_tiles or num_blocks]");
  const bool columns_are_blocks = mask.shape(3) != num_tiles;
  return to_numpy(fpsattn::lists_from_matrix(offsets.data(), num_tiles, mask.data(), mask.shape(0) * mask.shape(1),
                                             columns_are_blocks),
                  mask.shape(0), mask.shape(1));
}

// The lists must be valid (validate_lists).
py::tuple transpose_lists(const Int32Array& num_blocks, const Int32Array& indices, const Int32Array& offsets) {
  const int64_t num_tiles = num_tiles_of(offsets);
  const fpsattn::BlockListView lists = view_of(num_blocks, indices);
  FPSATTN_CHECK(lists.rows == num_tiles, "BlockMask: kv_num_blocks has ", lists.rows, " rows, expected ", num_tiles);
  const int32_t* first_block = offsets.data();
  fpsattn::validate_lists(lists, first_block[num_tiles]);
  return to_numpy(without_gil([&] { return fpsattn::transpose_lists(lists, first_block, num_tiles); }), lists.batch,
                  lists.heads);
}

void validate_lists(const Int32Array& num_blocks, const Int32Array& indices, int64_t blocks) {
  fpsattn::validate_lists(view_of(num_blocks, indices), blocks);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FPSATTN_VERSION;
  info["cuda"] = static_cast<bool>(FPSATTN_HAS_CUDA);
  info["cuda_reason"] = FPSATTN_CUDA_REASON;
  // Of nvcc, such as "13.0.88", "" without kernels. Its major version must be torch's: they share a runtime.
  info["cuda_version"] = FPSATTN_CUDA_VERSION;
  info["ptx_only"] = static_cast<bool>(FPSATTN_PTX_ONLY);
  info["torch_version"] = FPSATTN_TORCH_VERSION;
  info["compiler"] = FPSATTN_COMPILER;
  return info;
}

// fpsattn::Error says "fpsattn.plan: ..."; Python users see fpsattention.errors.ConfigError "fpsattention.plan: ...".
void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const fpsattn::Error& error) {
    const std::string text = "fpsattention." + std::string(error.what()).substr(std::strlen("fpsattn."));
    PyErr_SetString(py::module_::import("fpsattention.errors").attr("ConfigError").ptr(), text.c_str());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fpsattention planner, block lists and build info (C++)";
  py::register_local_exception_translator(&translate);
  m.def("plan", &plan, py::arg("grid"), py::arg("tile"), py::arg("text_len"), py::arg("text_position"));
  m.def("choose_tile", [](const Int3& grid) { return to_tuple(fpsattn::choose_tile(grid)); }, py::arg("grid"));
  m.def("sliding_tile_lists", &sliding_tile_lists, py::arg("tile_grid"), py::arg("tile_block_offsets"),
        py::arg("window"));
  m.def("lists_from_matrix", &lists_from_matrix, py::arg("tile_block_offsets"), py::arg("mask"));
  m.def("transpose_lists", &transpose_lists, py::arg("kv_num_blocks"), py::arg("kv_indices"),
        py::arg("tile_block_offsets"));
  m.def("validate_lists", &validate_lists, py::arg("kv_num_blocks"), py::arg("kv_indices"), py::arg("num_blocks"));
  m.def("build_info", &build_info);
}
