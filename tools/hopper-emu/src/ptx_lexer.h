// PTX text as tokens.
#pragma once

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "ptx.h"

namespace hemu {

enum class T : uint8_t { END, WORD, NUM, FNUM, STR, PUNCT };
struct Tok {
  T t = T::END;
  std::string_view s;
  int line = 0;
  int64_t i = 0;
  double f = 0;
  uint8_t fbits = 0;
  char p = 0;
};

struct Lexer {
  const char *b, *p, *e;
  int line = 1;
  Tok cur;
  explicit Lexer(const std::string& s) : b(s.data()), p(s.data()), e(s.data() + s.size()) { next(); }
  static bool wc(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }
  void skip_ws() {
    while (p < e) {
      if (*p == '\n') {
        line++;
        p++;
      } else if (*p == ' ' || *p == '\t' || *p == '\r')
        p++;
      else if (*p == '/' && p + 1 < e && p[1] == '/') {
        while (p < e && *p != '\n') p++;
      } else if (*p == '/' && p + 1 < e && p[1] == '*') {
        p += 2;
        while (p + 1 < e && !(*p == '*' && p[1] == '/')) {
          if (*p == '\n') line++;
          p++;
        }
        p += 2;
      } else
        break;
    }
  }
  void next() {
    skip_ws();
    cur = Tok();
    cur.line = line;
    if (p >= e || *p == 0) {
      cur.t = T::END;
      return;
    }
    const char* s = p;
    char c = *p;
    if (isdigit((unsigned char)c)) {
      if (c == '0' && (p[1] == 'f' || p[1] == 'F') && isxdigit((unsigned char)p[2])) {
        uint32_t v = (uint32_t)strtoul(std::string(p + 2, 8).c_str(), nullptr, 16);
        float f;
        memcpy(&f, &v, 4);
        cur.t = T::FNUM;
        cur.f = f;
        cur.i = v;
        cur.fbits = 32;
        p += 10;
      } else if (c == '0' && (p[1] == 'd' || p[1] == 'D') && isxdigit((unsigned char)p[2])) {
        uint64_t v = strtoull(std::string(p + 2, 16).c_str(), nullptr, 16);
        memcpy(&cur.f, &v, 8);
        cur.t = T::FNUM;
        cur.i = (int64_t)v;
        cur.fbits = 64;
        p += 18;
      } else {
        const char* q = p;
        bool fl = false;
        if (!(c == '0' && (p[1] == 'x' || p[1] == 'X' || p[1] == 'b' || p[1] == 'B'))) {
          while (isdigit((unsigned char)*q)) q++;
          if (*q == '.' && isdigit((unsigned char)q[1])) fl = true;
          if ((*q == 'e' || *q == 'E') && (isdigit((unsigned char)q[1]) || q[1] == '-' || q[1] == '+')) fl = true;
        }
        char* end;
        if (fl) {
          cur.t = T::FNUM;
          cur.f = strtod(p, &end);
          cur.fbits = 0;
          p = end;
        } else {
          cur.t = T::NUM;
          if (c == '0' && (p[1] == 'b' || p[1] == 'B')) {
            cur.i = (int64_t)strtoull(p + 2, &end, 2);
          } else
            cur.i = (int64_t)strtoull(p, &end, 0);
          p = end;
          if (*p == 'U' || *p == 'u') p++;
        }
      }
      cur.s = std::string_view(s, p - s);
      return;
    }
    if (wc(c)) {
      while (p < e) {
        if (wc(*p))
          p++;
        else if (*p == ':' && p[1] == ':' && (isalnum((unsigned char)p[2]) || p[2] == '_'))
          p += 2;
        else
          break;
      }
      cur.t = T::WORD;
      cur.s = std::string_view(s, p - s);
      return;
    }
    if (c == '"') {
      p++;
      while (p < e && *p != '"') {
        if (*p == '\\') p++;
        p++;
      }
      cur.t = T::STR;
      cur.s = std::string_view(s + 1, p - s - 1);
      p++;
      return;
    }
    cur.t = T::PUNCT;
    cur.p = c;
    cur.s = std::string_view(p, 1);
    p++;
  }
};

}  // namespace hemu
