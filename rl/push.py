"""Sends a checkpoint of a run, or a reward model, with its model card to a repository of the Hugging Face hub.

    python -m rl.push --run runs/quickstart --repo owner/name

The repository is made if it is not there, private unless ``--public``. What is sent is checked against its manifest
before. The token is the one of ``hf auth login`` or HF_TOKEN; it is never printed. The card of a finished run's last
checkpoint has the scores after RL, which were not known when the checkpoint was saved. The files go in one commit, so
that a failure leaves the repository as it was.
"""

from __future__ import annotations

if __name__ == "__main__":  # the checks must come before any import of our own packages
    from model.program.startup import run_command

    run_command("rl.push")

import threading
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars

from kernels.errors import MetronomeError
from model.program.arguments import Parser
from model.program.ranges import Range, number
from model.program.reading import UnreadableError, one_line, read_object
from model.program.startup import end_now
from model.weights import manifest
from model.weights.card import CARD, card
from reward.learned.resuming import MODEL
from rl.card import facts
from rl.folder import RunFolder
from rl.hub import HubConfig, RepoName
from rl.resume import load_progress

LOGIN = "`hf auth login`, or a token in HF_TOKEN that may write there"
REMEDIES = {401: LOGIN, 403: LOGIN, 404: f"does the owner exist? {LOGIN}"}
"""By the hub's status."""


def parser() -> Parser:
    parser = Parser("rl.push", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder: of rl.train or reward.train")
    parser.add_argument("--repo", required=True, help="owner/name")
    parser.add_argument("--step", type=number(int, Range(0, 10**9)), help="of rl.train's checkpoints; default: newest")
    parser.add_argument("--public", action="store_true", help="a repository that is made is public")
    parser.add_argument(
        "--timeout-s", type=number(int, Range(1, 86_400)), default=HubConfig.timeout_s, help="longest time in all"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    given = parser().parse_args(arguments)
    if problem := RepoName().problem(given.repo):
        raise MetronomeError(f"--repo {one_line(given.repo)}: {problem}")
    disable_progress_bars()
    late = f"{given.repo}: the hub at {constants.ENDPOINT} took longer than {given.timeout_s} s. {AGAIN}"
    # The library waits for a silent hub without end, in threads of its own, so the process ends under them.
    watch = threading.Timer(given.timeout_s, end_now, (late, lambda: None))
    watch.daemon = True
    watch.start()
    try:
        print(push(given.run, given.repo, given.step, not given.public))
    finally:
        watch.cancel()


AGAIN = "Nothing of the run has changed; the same command tries again"


def push(run: Path, repo: str, step: int | None = None, private: bool = True) -> str:
    """Sends one checkpoint; what was sent, in a line. Raises MetronomeError for a run without one, a damaged one, and
    whatever the hub or the way to it refuses."""
    folder, name, text = _found(run, step)
    if constants.is_offline_mode():
        raise MetronomeError(f"{repo}: HF_HUB_OFFLINE is set, so nothing is sent; unset it (HF_HUB_OFFLINE=0)")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != manifest.MANIFEST)
    additions = {p.relative_to(folder).as_posix(): str(p) for p in files}
    sent = additions | ({CARD: text.encode()} if text else {})
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path, content) for path, content in sent.items()]
        commit = api.create_commit(repo, operations, commit_message=f"{name}, by Metronome")
    # Broad on purpose: what the library raises for a hub that fails is open-ended.
    except Exception as error:
        raise MetronomeError(f"{repo}: {_reason(error)}. {AGAIN}") from None  # whose text may hold the token
    return f"{name} is at {commit.commit_url}"


def _found(run: Path, step: int | None) -> tuple[Path, str, str]:
    """(folder to send, its name for people, text of a card that replaces its own or "")."""
    if (run / MODEL / manifest.MANIFEST).is_file():
        if step is not None:
            raise MetronomeError(f"{run} is a run of reward.train, of which only the finished model is sent: no --step")
        manifest.check(run / MODEL, what="reward model")
        return run / MODEL, f"reward model {run.resolve().name}", ""
    if not (run / "config.yaml").is_file():
        raise MetronomeError(f"--run: {run} is not a run's folder (no config.yaml)")
    folder = RunFolder.reopen(run.resolve().parent, run.resolve().name)
    newest, path = folder.latest_checkpoint()
    path = path if step is None else folder.checkpoint_path(step)
    manifest.check(path)
    step = newest if step is None else step
    return path / "model", f"step {step} of {folder.path.name}", final_card(folder, step) if step == newest else ""


def final_card(folder: RunFolder, step: int) -> str:
    """The card of a finished run's last checkpoint, of ``step``; "" for a run that is not finished. Raises
    UnreadableError for a summary that is damaged."""
    if not (folder.path / "summary.json").is_file():
        return ""
    summary = read_object(folder.path / "summary.json")
    environment = read_object(folder.path / "environment.json")
    digest, contract = str(summary.get("weights_digest")), str(environment.get("contract_id"))
    if wrong := [name for name, value in summary.items() if name.startswith("eval/") and type(value) is not float]:
        raise UnreadableError(folder.path / "summary.json", f"{wrong[0]} is no number with a fraction")
    before = load_progress(folder.checkpoint_path(step)).before
    return card(facts(folder, step, digest, contract, before, summary))


def _reason(error: Exception) -> str:
    """Why nothing was sent, in one line and without the token."""
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the library's "Error while uploading …"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        remedy = f"; {REMEDIES[status]}" if status in REMEDIES else ""
        said = error.server_message or error.response.reason_phrase
        text = f"the hub at {constants.ENDPOINT} answers {status} ({said}){remedy}"
    else:
        text = f"the hub at {constants.ENDPOINT} cannot be used ({type(error).__name__}: {error})"
    if token := get_token():
        text = text.replace(token, "***")  # before it is cut, which could leave a part of it
    return one_line(" ".join(text.split()))[:500]


if __name__ == "__main__":
    main()
