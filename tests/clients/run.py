"""Outside programs as acceptance: each in a throwaway environment, against a server of ours on loopback.

    python tests/clients/run.py                 # all of them, one table
    python tests/clients/run.py litellm ai-sdk  # these
    python tests/clients/run.py --list

Needs the dev environment, the default model, and the package registries of pip and npm; node for `ai-sdk`. Everything
is bounded in time. Environments are removed once their program has run, unless `--keep` is given.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxllama.errors import one_line

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

from environments import InstallError, make_environment  # noqa: E402
from processes import free_port  # noqa: E402
from programs import FAKE, PROGRAMS, Program  # noqa: E402

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
# What clients of OpenAI's ask for by default, and what the checks do.
NAMES = ("default", "org/model", "gpt-6-astra", "gpt-3.5-turbo-instruct")
START_TIMEOUT_S = 900.0
END_TIMEOUT_S = 20.0


@dataclass
class Result:
    """What came of one program. `error` says why there is nothing to count. `total_s` has the server's start too."""

    program: Program
    num_passed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    skips: list[tuple[str, str]] = field(default_factory=list)
    error: str | None = None
    install_s: float = 0.0
    run_s: float = 0.0
    total_s: float = 0.0

    @property
    def is_ok(self) -> bool:
        return self.error is None and not self.failures and self.num_passed > 0


def main() -> int:
    options = _arguments()
    if options.list:
        print("\n".join(f"{program.name:<16} {program.version}" for program in PROGRAMS))
        return 0
    chosen = [program for program in PROGRAMS if not options.names or program.name in options.names]
    results = []
    for program in chosen:
        results.append(run_program(program, options.work / program.name, options.model))
        if not options.keep:
            shutil.rmtree(options.work / program.name, ignore_errors=True)
        print(_row(results[-1]), flush=True)
        print(_failures(results[-1]), end="", flush=True)
    print("\n" + table(results))
    return 0 if all(result.is_ok for result in results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="programs to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the programs' names and versions")
    parser.add_argument("--keep", action="store_true", help="keep the environments for the next run")
    parser.add_argument("--model", type=Path, default=MODEL, help="the default model, a converted checkpoint")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "clients", help="where environments are made")
    options = parser.parse_args()
    unknown = set(options.names) - {program.name for program in PROGRAMS}
    if unknown:
        parser.error(f"no program is called {', '.join(sorted(unknown))}; --list names them")
    return options


def run_program(program: Program, folder: Path, model: Path) -> Result:
    """Installs the program, starts a server for it, runs its checks and ends the server.

    Whatever goes wrong is this program's result: the others are run all the same.
    """
    result, begin = Result(program), time.monotonic()
    try:
        source = make_environment(program, folder)
        result.install_s = time.monotonic() - begin
        with tempfile.TemporaryDirectory(prefix="jaxllama-clients-") as scratch, serving(program.server, model) as url:
            start = time.monotonic()
            report = Path(scratch) / "report.xml"
            said = _run_checks(program, folder, source, Path(scratch), url, model)
            result.run_s = time.monotonic() - start
            read_report(report, said, result)
    except InstallError as error:
        result.install_s = time.monotonic() - begin
        result.error = f"not installed: {error}"
    except ServerError as error:
        result.error = str(error)
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
    result.total_s = time.monotonic() - begin
    return result


class ServerError(Exception):
    """Our server did not come up."""


@contextlib.contextmanager
def serving(kind: str, model: Path) -> Iterator[str]:
    """A server process on a free port of loopback, ready; yields its URL and ends it."""
    port = free_port()
    if kind == FAKE:
        command = [HERE / "fake_model.py", "--port", port, "--names", *NAMES]
    else:
        command = ["-m", "jaxllama", "serve", model, "--port", port, "--max-rows", 4, "--max-context", 4096]
        command += ["--log-level", "warning", "--served-model-name", *NAMES]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environ, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: object) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url + "/ready", None, 5).close()
            return
        time.sleep(0.2)
    log.seek(0)  # type: ignore[attr-defined]
    raise ServerError(f"the server did not get ready:\n{log.read()[-2000:]}")  # type: ignore[attr-defined]


def _run_checks(program: Program, folder: Path, source: Path | None, scratch: Path, url: str, model: Path) -> str:
    """Runs the checks in the program's environment; returns the end of what they printed."""
    checks, report = HERE / program.checks, scratch / "report.xml"
    if program.is_node:
        # Modules are looked up beside the file that imports them.
        own = shutil.copy(checks, folder / "checks.test.mjs")
        command = ["node", "--test", "--test-reporter=junit", f"--test-reporter-destination={report}", own]
        cwd = folder
    else:
        python = folder / "env" / "bin" / "python"
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", f"--junitxml={report}"]
        command += ["--timeout=300", "-o", "junit_family=xunit1"]
        if source is None:
            command += ["-c", HERE / "pytest.ini", checks]
        else:
            command += ["-o", "addopts=", "-p", checks.stem, *program.suite]
        cwd = source or scratch
    environ = _environment(folder, scratch, url, model) | ({} if source is None else {"PYTHONPATH": str(checks.parent)})
    with tempfile.TemporaryFile("w+") as output:
        # A session of its own, so that what the program started ends with it.
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(program.timeout_s)
        except subprocess.TimeoutExpired:
            output.write(f"\nended after {program.timeout_s:.0f} s\n")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return output.read()[-2000:]


def _environment(folder: Path, scratch: Path, url: str, model: Path) -> dict[str, str]:
    """What a client needs, and nothing of ours; its home is thrown away, and it has no hub to ask."""
    kept = {name: value for name in ("LANG", "SSL_CERT_FILE") if (value := os.environ.get(name)) is not None}
    return kept | {
        "PATH": f"{folder / 'env' / 'bin'}:{os.environ['PATH']}",
        "HOME": str(scratch),
        "JAXLLAMA_URL": url,
        "JAXLLAMA_CHECKPOINT": str(model),
        "TEST_API_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": "none",
        "JAXLLAMA_API_KEY": "none",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


def read_report(report: Path, said: str, result: Result) -> None:
    """Counts the cases of a JUnit report into `result`; the end of the output explains a missing one."""
    if not report.is_file() or not report.stat().st_size:
        result.error = f"no report: {said}"
        return
    for case in ET.parse(report).iter("testcase"):
        name = case.get("name", "")
        bad, skipped = case.find("failure"), case.find("skipped")
        bad = case.find("error") if bad is None else bad
        if bad is not None:
            # Of a failed import pytest's message says nothing, the text's last line does.
            message, text = (bad.get("message") or "").strip(), (bad.text or "").strip()
            result.failures.append((name, message[:600] if ":" in message else f"{message} {text[-600:]}"))
        elif skipped is not None:
            result.skips.append((name, (skipped.get("message") or "").strip()))
        else:
            result.num_passed += 1


def _row(result: Result) -> str:
    program = result.program
    counts = f"{result.num_passed} | {len(result.failures)} | {len(result.skips)}" if not result.error else "– | – | –"
    return f"| {program.name} | {program.version} | {program.server} | {counts} | {result.run_s:.0f} |"


def _failures(result: Result) -> str:
    """A paragraph for each message, with the checks that ended in it."""
    names: dict[str, list[str]] = collections.defaultdict(list)
    for name, message in result.failures:
        names[message].append(name)
    found = "".join(f"    {', '.join(dict.fromkeys(found))}:\n        {message}\n" for message, found in names.items())
    return found + (f"    {result.error}\n" if result.error else "")


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each program, then why programs were not run and checks skipped, a line each."""
    lines = ["| client | version | model | passed | failed | skipped | seconds |", "| --- " * 7 + "|"]
    lines += [_row(result) for result in results]
    lines += [f"* {result.program.name}: {one_line(result.error)}" for result in results if result.error]
    for result in results:
        reasons = collections.Counter(reason for _, reason in result.skips)
        lines += [f"* {result.program.name}, skipped {n}: {reason}" for reason, n in reasons.items()]
    total, installing, running = (
        sum(getattr(result, name) for result in results) / 60 for name in ("total_s", "install_s", "run_s")
    )
    lines.append(
        f"{total:.1f} minutes: {installing:.1f} of installing, {running:.1f} of checks, the rest servers' starts."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
