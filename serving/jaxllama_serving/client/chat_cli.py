"""The command line of `jaxllama chat`: a chat in the terminal, with a checkpoint or with a server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllama.errors import MissingExtraError
from jaxllama_serving.config import ServerConfig
from jaxllama_serving.process.cli import add_behaviour, add_model, behaviour, load_model

if TYPE_CHECKING:
    import aiohttp
    from prompt_toolkit import PromptSession
    from rich.console import Console

    from jaxllama_serving.client.api import Endpoint
    from jaxllama_serving.client.conversation import Conversation

_HELP = """\
Enter sends, Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves.

/system TEXT      the system prompt; without TEXT none
/set NAME VALUE   a field of the request, e.g. /set temperature 0.7; without VALUE takes it out
/settings         what is sent beside the messages
/retry            asks the last question again
/undo             takes the last question and its answer back
/clear            begins anew; system prompt and settings stay
/think            shows the reasoning of the last answer
/fold on|off      whether reasoning becomes one line when the answer begins
/save FILE        writes the conversation: .md as Markdown, else as JSON
/load FILE        goes on with one that was saved as JSON
/quit, /exit      leaves
"""
_HISTORY = Path("~/.cache/jaxllama/chat_history")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `jaxllama chat`."""
    parser.add_argument("where", metavar="CKPT|URL", help="a checkpoint, or a server such as http://localhost:8000")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="as /set; repeatable"
    )
    parser.add_argument("--no-fold", action="store_true", help="leave reasoning on the screen")
    server = parser.add_argument_group("with a server")
    server.add_argument("--model", help="the model's name (default: the first that the server names)")
    server.add_argument("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY")
    add_model(parser.add_argument_group("with a checkpoint: model and engine"))
    add_behaviour(parser.add_argument_group("with a checkpoint: API behaviour"))


def run(args: argparse.Namespace) -> int:
    """Runs `jaxllama chat` until the user leaves. Returns 0.

    Raises: JaxLlamaError for a checkpoint or server that cannot be used, or a missing package.
    """
    try:
        import aiohttp  # noqa: F401
        import prompt_toolkit  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("serve", error.name or "aiohttp") from None
    if "://" in args.where and not args.where.startswith(("gs://", "s3://")):
        return asyncio.run(_chat_with_server(args))
    args.checkpoint = args.where
    with load_model(args, max_queue=16) as llama:
        if sys.stderr.isatty() and not args.quiet:
            print("compiling …", file=sys.stderr, end="\r", flush=True)
        llama.engine.warm_up()
        return asyncio.run(_chat_with_checkpoint(args, llama))


async def _chat_with_server(args: argparse.Namespace) -> int:
    import aiohttp

    from jaxllama_serving.client.api import Endpoint

    endpoint = Endpoint.parse(args.where, args.api_key)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None, sock_connect=30)) as session:
        return await Chat(args, endpoint, session, args.model or await endpoint.model(session)).run()


async def _chat_with_checkpoint(args: argparse.Namespace, llama: Any) -> int:
    from jaxllama_serving.client.api import Endpoint
    from jaxllama_serving.process.inside import inside_session
    from jaxllama_serving.process.server import check_model

    config = ServerConfig(**behaviour(args))
    check_model(llama, config)
    async with inside_session(llama, config) as session:
        return await Chat(args, Endpoint("http://inside/v1"), session, config.model_names[0]).run()


class Chat:
    """One chat at a terminal; where input is no terminal, each line of it is asked and answered in plain text."""

    def __init__(
        self, args: argparse.Namespace, endpoint: Endpoint, session: aiohttp.ClientSession, model: str
    ) -> None:
        from rich.console import Console

        from jaxllama_serving.client.conversation import Conversation

        self._endpoint = endpoint
        self._session = session
        self._console: Console = Console()
        self._folds = not args.no_fold
        self._conversation: Conversation = Conversation(model, args.system)
        for name, value in args.set:
            self._conversation.set(name, value)

    async def run(self) -> int:
        """Until the user leaves."""
        is_terminal = sys.stdin.isatty() and self._console.is_terminal
        if is_terminal:
            self._console.print(f"{self._conversation.model}: /help lists the commands", style="dim", highlight=False)
        async for line in _typed_lines() if is_terminal else _piped_lines():
            if line.strip() in ("/quit", "/exit"):
                break
            await self._take(line.strip())
        return 0

    async def _take(self, line: str) -> None:
        from jaxllama.errors import JaxLlamaError

        try:
            if line.startswith("/") and not line.startswith("//"):
                if self._command(*line[1:].split(maxsplit=1)):
                    await self._answer()
            elif line:
                # "//" is a message that begins with a slash.
                self._conversation.ask(line.removeprefix("/") if line.startswith("//") else line)
                await self._answer()
        except JaxLlamaError as error:
            self._console.print(f"{error}", style="red", highlight=False, markup=False)

    def _command(self, name: str = "", rest: str = "") -> bool:
        """Carries out a command. Returns whether an answer is wanted."""
        from jaxllama_serving.client.conversation import ChatError

        talk = self._conversation
        words = rest.split(maxsplit=1)
        commands: dict[str, Callable[[], object]] = {
            "help": lambda: self._console.print(_HELP, highlight=False, markup=False),
            "system": lambda: setattr(talk, "system", rest),
            "set": lambda: talk.set(words[0], words[1] if len(words) > 1 else ""),
            "settings": lambda: self._console.print(talk.settings or "none", markup=False),
            "retry": talk.drop_answer,
            "undo": talk.undo,
            "clear": talk.messages.clear,
            "think": lambda: self._console.print(talk.reasoning or "no reasoning", style="dim italic", markup=False),
            "fold": lambda: setattr(self, "_folds", rest != "off"),
            "save": lambda: talk.save(Path(rest)),
            "load": lambda: talk.load(Path(rest)),
        }
        needs = {"set": "NAME VALUE", "save": "FILE", "load": "FILE"}
        if name not in commands:
            raise ChatError(f"/{name} is not a command; /help lists them. Begin a message with // for a slash")
        if name in needs and not rest:
            raise ChatError(f"/{name} needs {needs[name]}")
        commands[name]()
        return name == "retry"

    async def _answer(self) -> None:
        """Asks for the next answer and shows it. Ctrl-C ends it; what has come is kept."""
        from jaxllama_serving.client.terminal import AnswerView

        reasoning: list[str] = []
        content: list[str] = []
        num_tokens: int | None = None
        view = AnswerView(self._console, fold=self._folds)
        was_stopped = False
        try:
            with view, _ctrl_c_cancels():
                async for chunk in self._endpoint.chat(self._session, self._conversation.body()):
                    for choice in chunk.get("choices") or []:
                        delta = choice.get("delta") or {}
                        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
                        said = delta.get("content") or ""
                        reasoning.append(thought)
                        content.append(said)
                        view.add(thought, said)
                    num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
        except asyncio.CancelledError:
            was_stopped = True
        finally:
            if any(content) or any(reasoning):
                self._conversation.answer("".join(content), "".join(reasoning))
            elif self._conversation.messages[-1]["role"] == "user" and not was_stopped:
                # A refused question would be refused again with the next one.
                self._conversation.messages.pop()
        if self._console.is_terminal:
            stopped = "stopped; " if was_stopped else ""
            self._console.print(stopped + view.summary(num_tokens), style="dim", highlight=False)


@contextlib.contextmanager
def _ctrl_c_cancels() -> Any:
    """Ctrl-C cancels the task that is in this context, and nothing else."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None

    def cancel() -> None:
        task.cancel()

    try:
        loop.add_signal_handler(signal.SIGINT, cancel)
    except (NotImplementedError, RuntimeError):  # Windows, or not the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        task.uncancel()


async def _piped_lines() -> AsyncIterator[str]:
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield line


async def _typed_lines() -> AsyncIterator[str]:
    session = _prompt_session()
    while True:
        try:
            yield await session.prompt_async("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _prompt_session() -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    path = _HISTORY.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        history: FileHistory | InMemoryHistory = FileHistory(str(path))
    except OSError:
        history = InMemoryHistory()
    return PromptSession(history=history, key_bindings=keys, prompt_continuation="… ")
