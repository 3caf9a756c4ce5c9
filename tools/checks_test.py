#!/usr/bin/env python3
"""Tests of the checks: each finds a violation planted in a small tree, and passes the tree without it."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

TOOLS = pathlib.Path(__file__).resolve().parent


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TreeTest(unittest.TestCase):
    def setUp(self):
        self._folder = tempfile.TemporaryDirectory()
        self.addCleanup(self._folder.cleanup)
        self.root = pathlib.Path(self._folder.name).resolve()

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run_check(self, script, *arguments):
        command = [str(TOOLS / script), "--root", str(self.root), *arguments]
        if script.endswith(".py"):
            command.insert(0, sys.executable)
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def assert_clean(self, script, *arguments):
        code, output = self.run_check(script, *arguments)
        self.assertEqual(code, 0, output)

    def assert_finds(self, message, script, *arguments):
        code, output = self.run_check(script, *arguments)
        self.assertEqual(code, 1, output)
        self.assertIn(message, output)


class LayersTest(TreeTest):
    def setUp(self):
        super().setUp()
        self.write("LAYERS", "base:\nops: base\nmodel: base ops\ntorch-free: base/*\n")
        self.write("src/base/a.h", "#pragma once\n#include <vector>\n")
        self.write("src/ops/b.h", '#include "base/a.h"\n#include "hwy/highway.h"\n#include <torch/torch.h>\n')
        self.write("src/model/c.cc", '#include "ops/b.h"\n')

    def test_clean(self):
        self.assert_clean("check_layers.py")

    def test_upward_include(self):
        self.write("src/ops/d.cc", '\n  #  include "model/m.h"\n')
        self.write("src/model/m.h", "")
        self.assert_finds("src/ops/d.cc:2: 'ops' may not include 'model/m.h'", "check_layers.py")

    def test_missing_header(self):
        self.write("src/ops/d.cc", '#include "base/gone.h"\n')
        self.assert_finds("src/ops/d.cc:1: there is no src/base/gone.h", "check_layers.py")

    def test_angled_project_header(self):
        self.write("src/ops/d.cc", "#include <base/a.h>\n")
        self.assert_finds("src/ops/d.cc:1: <base/a.h> is the project's", "check_layers.py")

    def test_include_without_room(self):
        self.write("src/ops/d.cc", '#include "b.h"\n')
        self.assert_finds('src/ops/d.cc:1: "b.h": write includes as', "check_layers.py")

    def test_unknown_room(self):
        self.write("src/attic/d.cc", "")
        self.assert_finds("src/attic/d.cc: room 'attic' is not in LAYERS", "check_layers.py")

    def test_rooms_out_of_order(self):
        self.write("LAYERS", "base: ops\nops: base\nmodel: base ops\n")
        self.assert_finds("LAYERS:1: 'base' may include 'ops', which comes later", "check_layers.py")

    def test_direct_torch(self):
        self.write("src/base/d.cc", "#include <c10/core/Device.h>\n")
        self.assert_finds("src/base/d.cc: must be free of torch", "check_layers.py")

    def test_torch_through_headers(self):
        self.write("LAYERS", "base:\nops: base\nmodel: base ops\ntorch-free: model/c.cc\n")
        self.assert_finds("must be free of torch, but includes ops/b.h -> torch/torch.h", "check_layers.py")

    def test_stale_pattern(self):
        self.write("LAYERS", "base:\nops: base\nmodel: base ops\ntorch-free: base/gone.*\n")
        self.assert_finds("'base/gone.*' matches no file", "check_layers.py")


class FormatTest(TreeTest):
    def setUp(self):
        super().setUp()
        self.write(".clang-format", "BasedOnStyle: Google\nColumnLimit: 100\n")
        self.write("src/base/a.h", "int F(int x);\n")

    def test_clean(self):
        self.assert_clean("check_format.sh")

    def test_badly_formatted_file_is_found_and_fixed(self):
        self.write("tests/b.cc", "int  F( int x ){return x;}\n")
        self.assert_finds("tests/b.cc: not formatted", "check_format.sh")
        self.assert_clean("check_format.sh", "--fix")
        self.assert_clean("check_format.sh")

    def test_nothing_to_check_is_an_error(self):
        os.remove(self.root / "src/base/a.h")
        code, output = self.run_check("check_format.sh")
        self.assertEqual(code, 2, output)


class TextTest(TreeTest):
    def test_clean(self):
        self.write("src/a.cc", "int x;\n" * 800)
        self.write("docs/a.md", "See https://example.org/paper.\n")
        self.write("tools/a.sh", 'cp "$root/home" here\n')
        self.assert_clean("check_text.py")

    def test_long_file(self):
        self.write("src/a.cc", "int x;\n" * 801)
        self.assert_finds("src/a.cc: 801 lines, over 800", "check_text.py")

    def test_long_data_file_is_fine(self):
        self.write("tests/data/a.txt", "line\n" * 2000)
        self.assert_clean("check_text.py")

    def test_trailing_space(self):
        self.write("src/a.cc", "int x; \n")
        self.assert_finds("src/a.cc:1: white space", "check_text.py")

    def test_no_newline_at_end(self):
        self.write("src/a.cc", "int x;")
        self.assert_finds("src/a.cc: no newline", "check_text.py")

    def test_server_in_setup(self):
        self.write("requirements-x.txt", "--index-url " + "https:" + "//example.org/simple\n")
        self.assert_finds("requirements-x.txt:1: names a server", "check_text.py")

    def test_local_folder(self):
        self.write("docs/a.md", f"Run it in {self.root}/build.\n")
        self.assert_finds("docs/a.md:1: names a folder of this machine", "check_text.py")

    def test_home_folder(self):
        self.write("docs/a.md", f"see {pathlib.Path.home()}/x\n")
        self.assert_finds("docs/a.md:1: names a folder of this machine", "check_text.py")


class RegisteredTest(TreeTest):
    """check() with the build's two lists given, and the whole script on a small real build."""

    module = load("check_tests_registered")

    def check(self, registered, tests, with_cuda=False):
        registered = {(kind, self.root / source): name for kind, source, name in registered}
        return self.module.check(self.root, registered, tests, with_cuda)[1]

    def test_all_registered(self):
        self.write("src/a_test.cc", "")
        self.write("src/a_fuzz.cc", "")
        self.write("tools/b_test.py", "")
        registered = [("test", "src/a_test.cc", "a_test"), ("fuzz", "src/a_fuzz.cc", "a_fuzz")]
        tests = {"a_test": "bin/a_test", "b": f"python3 {self.root}/tools/b_test.py"}
        self.assertEqual(self.check(registered, tests), [])

    def test_undeclared_sources(self):
        for name in ("src/a_test.cc", "src/b_fuzz.cc", "bench/c_bench.cc", "tests/d_test.py"):
            self.write(name, "")
        errors = "\n".join(self.check([], {}))
        for name in ("src/a_test.cc", "src/b_fuzz.cc", "bench/c_bench.cc", "tests/d_test.py"):
            self.assertIn(f"{name}: no", errors)

    def test_fuzz_source_declared_as_a_test_only(self):
        self.write("src/a_fuzz.cc", "")
        self.assertIn("src/a_fuzz.cc: not in the build", self.check([("test", "src/a_fuzz.cc", "a")], {"a": ""})[0])

    def test_declared_but_not_run(self):
        self.write("src/a_test.cc", "")
        self.assertIn("CTest does not run its test a_test", self.check([("test", "src/a_test.cc", "a_test")], {})[0])

    def test_cuda_sources_count_where_cuda_is(self):
        self.write("src/a_test.cu", "")
        self.write("src/cuda/b_test.cc", "")
        self.assertEqual(self.check([], {}), [])
        errors = self.check([], {}, with_cuda=True)
        self.assertIn("src/a_test.cu: not in the build", errors[0])
        self.assertIn("src/cuda/b_test.cc: not in the build", errors[1])

    def test_script_on_a_configured_build(self):
        self.write("build/registered.txt", f"test\ta_test\t{self.root}/src/a_test.cc\n")
        self.write("build/CTestTestfile.cmake", 'add_test(a_test "true")\n')
        self.write("src/a_test.cc", "")
        build = str(self.root / "build")
        self.assert_clean("check_tests_registered.py", "--build", build)
        self.write("src/b_test.cc", "")
        self.assert_finds("src/b_test.cc: not in the build", "check_tests_registered.py", "--build", build)
        self.write("build/CTestTestfile.cmake", 'add_test(a_test "true")\nset_tests_properties(a_test PROPERTIES DISABLED TRUE)\n')
        self.assert_finds("CTest does not run its test a_test", "check_tests_registered.py", "--build", build)


class QuickstartTest(TreeTest):
    """Its arguments are looked at before anything is installed or built."""

    STEPS_BEGIN = 9  # the status by which the first step is seen

    def run_quickstart(self, *arguments):
        for name in ("quickstart", "tools/main_job"):
            self.write(name, (TOOLS.parent / name).read_text())
            (self.root / name).chmod(0o755)
        self.write("tools/setup_lib.sh", f"machine_step() {{ exit {self.STEPS_BEGIN}; }}\n")
        done = subprocess.run([self.root / "quickstart", *arguments], capture_output=True, text=True)
        return done.returncode, done.stderr

    def test_wrong_ones_are_named(self):
        self.assertEqual(self.run_quickstart("--prot", "1"), (2, "main_job: unknown option '--prot'; there are --no-serve, --demo and --port N\n"))
        self.assertEqual(self.run_quickstart("--port", "x")[0], 2)
        self.assertEqual(self.run_quickstart("/no/text")[0], 2)

    def test_right_ones_begin(self):
        self.write("text.txt", "text")
        for arguments in (["--demo", "--port", "1"], ["--no-serve", self.root / "text.txt"], ["--no-run"]):
            self.assertEqual(self.run_quickstart(*arguments), (self.STEPS_BEGIN, ""))


if __name__ == "__main__":
    unittest.main()
