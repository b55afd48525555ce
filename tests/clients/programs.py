"""The outside programs, with the versions that were accepted last. A new version is one edit here."""

from __future__ import annotations

from dataclasses import dataclass

CHECKS = ("pytest==9.2.0", "pytest-asyncio==1.5.0", "pytest-timeout==2.4.0")
"""What every Python environment has beside its client."""

FAKE, DEFAULT = "fake", "default"


@dataclass(frozen=True)
class Program:
    """One client in an environment of its own.

    `packages` are of pip, or of npm when `checks` is JavaScript; the first one is the client, whose version the table
    shows. `without_dependencies` are installed as data. `suite` are paths in the client's source distribution that are
    run as they are, `checks` then being a pytest plugin. `server` is the fake model or the default one, `python`
    another version than ours.
    """

    name: str
    packages: tuple[str, ...]
    checks: str
    server: str = FAKE
    without_dependencies: tuple[str, ...] = ()
    suite: tuple[str, ...] = ()
    python: str | None = None
    timeout_s: float = 900.0

    @property
    def is_node(self) -> bool:
        return self.checks.endswith(".mjs")

    @property
    def client(self) -> str:
        """The client's requirement, without extras: `name==version`, for npm `name@version`."""
        first = (self.without_dependencies or self.packages)[0]
        return first.split("[")[0] + first.split("]")[-1] if "[" in first else first

    @property
    def version(self) -> str:
        return self.client.rpartition("@" if self.is_node else "==")[2]


PROGRAMS = (
    Program(
        "openai-python",
        ("openai[aiohttp]==3.57.0", "rich==15.0.0"),
        "sdks/openai_python_plugin.py",
        suite=(
            "tests/api_resources/test_models.py",
            "tests/api_resources/test_completions.py",
            "tests/api_resources/chat/test_completions.py",
        ),
    ),
    Program(
        "langchain",
        ("langchain-tests==1.1.9", "langchain-openai==1.7.4"),
        "frameworks/langchain_checks.py",
    ),
    Program(
        "ai-sdk",
        ("@ai-sdk/deepinfra@3.0.57", "ai@7.0.173", "zod@4.6.7"),
        "sdks/ai_sdk_checks.mjs",
    ),
    Program("litellm", ("litellm==1.110.2",), "sdks/litellm_checks.py"),
    # The newest release whose `proxy` extra the registry has whole.
    Program("litellm-proxy", ("litellm[proxy]==1.108.0",), "sdks/litellm_proxy_checks.py"),
    Program("llama-index", ("llama-index-llms-deepinfra==0.7.0",), "sdks/llama_index_checks.py"),
    Program("openai-agents", ("openai-agents==0.24.0",), "frameworks/openai_agents_checks.py"),
    Program("pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",), "frameworks/pydantic_ai_checks.py"),
    Program("instructor", ("instructor==1.17.0",), "sdks/instructor_checks.py", DEFAULT),
    Program(
        "bfcl",
        ("openai==3.57.0", "jsonschema==4.26.0"),
        "evaluations/bfcl_checks.py",
        DEFAULT,
        without_dependencies=("bfcl-eval==2026.3.23",),
    ),
    Program("inspect-ai", ("inspect-ai==0.3.285", "openai==3.57.0"), "evaluations/inspect_checks.py", DEFAULT),
    Program("lm-eval", ("lm-eval[api]==0.4.13", "transformers==5.24.0"), "evaluations/lm_eval_checks.py", DEFAULT),
    Program("aiperf", ("aiperf==0.13.0",), "evaluations/aiperf_checks.py"),
    # Its torch only loads data: the one of the oracle's environment, which for Python 3.11 has no GPU's libraries here.
    Program(
        "guidellm",
        ("guidellm==0.8.1", "torch==2.13.0"),
        "evaluations/guidellm_checks.py",
        python="3.11",
    ),
)
