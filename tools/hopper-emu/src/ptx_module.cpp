// Look-ups in a parsed module.
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "ptx.h"

namespace hemu {

int PtxFunc::find_label(int scope, const std::string& n) const {
  for (int s = scope; s >= 0; s = scope_parent[s]) {
    auto it = labels.find({s, n});
    if (it != labels.end()) return it->second;
  }
  return -1;
}

std::string PtxModule::source_line(int line) const {
  if (line < 1 || line >= (int)line_start.size()) return "";
  uint32_t b = line_start[line], e = b;
  while (e < text.size() && text[e] != '\n') e++;
  while (b < e && (text[b] == ' ' || text[b] == '\t')) b++;
  std::string s = text.substr(b, e - b);
  for (auto& c : s)
    if (c == '\t') c = ' ';
  return s;
}

uint32_t type_bytes(const std::string& t) {
  if (t == "b8" || t == "u8" || t == "s8") return 1;
  if (t == "b16" || t == "u16" || t == "s16" || t == "f16" || t == "bf16" || t == "e4m3x2" || t == "e5m2x2") return 2;
  if (t == "b32" || t == "u32" || t == "s32" || t == "f32" || t == "f16x2" || t == "bf16x2" || t == "tf32") return 4;
  if (t == "b64" || t == "u64" || t == "s64" || t == "f64") return 8;
  if (t == "b128") return 16;
  return 0;
}

}  // namespace hemu
