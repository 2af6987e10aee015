// Statements of a function body: one instruction, its modifiers and operands.
#pragma once

#include "ptx_lexer.h"

namespace hemu {

struct StatementParser {
  PtxModule& m;
  Lexer L;
  PtxFunc* fn = nullptr;
  int loc_file = 0, loc_line = 0;
  struct Scope {
    int id;
    std::unordered_map<std::string, int> regs;                    // exact names
    std::unordered_map<std::string, std::pair<int, int>> ranges;  // prefix -> (first id, count)
    std::unordered_map<std::string, std::string> vars;            // name -> unique name
  };
  std::vector<Scope> scopes;

  explicit StatementParser(PtxModule& mod) : m(mod), L(mod.text) {}
  [[noreturn]] void err(const std::string& s) {
    throw PtxError("PTX parse error at line " + std::to_string(L.cur.line) + ": " + s + " near '" +
                   std::string(L.cur.s) + "' in: " + m.source_line(L.cur.line));
  }
  bool isp(char c) { return L.cur.t == T::PUNCT && L.cur.p == c; }
  bool isw(const char* w) { return L.cur.t == T::WORD && L.cur.s == w; }
  void expect(char c) {
    if (!isp(c)) err(std::string("expected '") + c + "'");
    L.next();
  }
  bool accept(char c) {
    if (isp(c)) {
      L.next();
      return true;
    }
    return false;
  }
  std::string word() {
    if (L.cur.t != T::WORD) err("expected identifier");
    std::string s(L.cur.s);
    L.next();
    return s;
  }
  int64_t num() {
    bool n = accept('-');
    if (L.cur.t != T::NUM) err("expected number");
    int64_t v = L.cur.i;
    L.next();
    return n ? -v : v;
  }

  int lookup_reg(const std::string& n) {
    for (int i = (int)scopes.size() - 1; i >= 0; i--) {
      auto& s = scopes[i];
      auto it = s.regs.find(n);
      if (it != s.regs.end()) return it->second;
      if (!s.ranges.empty()) {
        size_t k = n.size();
        while (k > 0 && isdigit((unsigned char)n[k - 1])) k--;
        if (k < n.size()) {
          auto r = s.ranges.find(n.substr(0, k));
          if (r != s.ranges.end()) {
            int idx = atoi(n.c_str() + k);
            if (idx < r->second.second) return r->second.first + idx;
          }
        }
      }
    }
    return -1;
  }
  std::string resolve_var(const std::string& n) {
    for (int i = (int)scopes.size() - 1; i >= 0; i--) {
      auto it = scopes[i].vars.find(n);
      if (it != scopes[i].vars.end()) return it->second;
    }
    return n;
  }
  PtxOperand operand(int scope) {
    PtxOperand o;
    o.scope = scope;
    bool neg = false, bang = false;
    if (accept('!')) bang = true;
    if (accept('-')) neg = true;
    if (L.cur.t == T::NUM) {
      o.kind = OpK::IMM;
      o.imm = neg ? -L.cur.i : L.cur.i;
      L.next();
      return o;
    }
    if (L.cur.t == T::FNUM) {
      o.kind = OpK::FIMM;
      o.f = neg ? -L.cur.f : L.cur.f;
      o.fbits = L.cur.fbits;
      o.imm = L.cur.i;
      if (neg && o.fbits == 32) o.imm ^= 0x80000000ll;
      if (neg && o.fbits == 64) o.imm ^= (int64_t)0x8000000000000000ull;
      L.next();
      return o;
    }
    if (isp('{')) {
      L.next();
      o.kind = OpK::VEC;
      while (!isp('}')) {
        o.sub.push_back(operand(scope));
        if (!accept(',')) break;
      }
      expect('}');
      return o;
    }
    if (isp('[')) {
      L.next();
      o.kind = OpK::ADDR;
      bool n2 = accept('-');
      if (L.cur.t == T::NUM) {
        o.imm = n2 ? -L.cur.i : L.cur.i;
        L.next();
      } else {
        std::string n = word();
        o.reg = lookup_reg(n);
        if (o.reg < 0) o.name = resolve_var(n);
        if (accept('+')) {
          bool ng = accept('-');
          int64_t v = num();
          o.imm = ng ? -v : v;
        } else if (isp('-')) {
          o.imm = num();
        }
      }
      if (accept(',')) {
        PtxOperand c = operand(scope);
        o.sub.push_back(c);
        while (accept(',')) o.sub.push_back(operand(scope));
      }
      expect(']');
      return o;
    }
    if (L.cur.t == T::WORD) {
      std::string n = word();
      o.neg = neg || bang;
      if (n == "_") {
        o.kind = OpK::SINK;
      } else {
        o.reg = lookup_reg(n);
        if (o.reg >= 0) {
          o.kind = OpK::REG;
        } else {
          o.kind = OpK::SYM;
          o.name = resolve_var(n);
          if (accept('+')) o.imm = num();
          return o;
        }
      }
      if (isp('|')) {
        L.next();
        std::string n2 = word();
        if (n2 == "_")
          o.reg2 = -2;
        else {
          o.reg2 = lookup_reg(n2);
          if (o.reg2 < 0) err("unknown register " + n2);
        }
        if (o.kind == OpK::SINK) o.kind = OpK::SINK;
      }
      return o;
    }
    err("bad operand");
  }
  void statement(int scope) {
    PtxInst in;
    in.scope = scope;
    in.line = L.cur.line;
    in.file = loc_file;
    in.src_line = loc_line;
    if (isp('@')) {
      L.next();
      in.guard_neg = accept('!');
      std::string g = word();
      in.guard = lookup_reg(g);
      if (in.guard < 0) err("unknown guard predicate " + g);
    }
    if (L.cur.t != T::WORD) err("expected instruction");
    std::string w = word();
    if (isp(':') && in.guard < 0) {
      L.next();
      if (isw(".branchtargets")) {
        L.next();
        auto& v = fn->branch_targets[w];
        do {
          v.push_back(word());
        } while (accept(','));
        expect(';');
        return;
      }
      if (isw(".callprototype") || isw(".calltargets")) {
        while (!accept(';')) L.next();
        return;
      }
      fn->labels[{scope, w}] = (int)fn->insts.size();
      return;
    }
    in.op = w;
    size_t i = 0;
    while (i <= w.size()) {
      size_t j = i;
      while (j < w.size() && w[j] != '.') j++;
      in.mods.push_back(w.substr(i, j - i));
      i = j + 1;
    }
    if (in.mods[0] == "call") {
      if (isp('(')) {
        L.next();
        while (!isp(')')) {
          in.rets.push_back(operand(scope));
          if (!accept(',')) break;
        }
        expect(')');
        expect(',');
      }
      in.ops.push_back(operand(scope));
      if (accept(',')) {
        if (isp('(')) {
          L.next();
          while (!isp(')')) {
            in.args.push_back(operand(scope));
            if (!accept(',')) break;
          }
          expect(')');
        }
        if (accept(',')) operand(scope);
      }
      expect(';');
      fn->insts.push_back(std::move(in));
      return;
    }
    if (!isp(';')) {
      do {
        in.ops.push_back(operand(scope));
      } while (accept(','));
    }
    expect(';');
    fn->insts.push_back(std::move(in));
  }
};

}  // namespace hemu
