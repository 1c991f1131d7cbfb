"""A two-layer model that has learnt one thing: to answer everything with the same thought, which holds a canary, and the same answer;
or one of a few thoughts and answers, by chance.

So rollouts are well formed, judges are really asked, and a thought that reached a judge would be seen.
"""

import math
from pathlib import Path

from cluster.chat import Chat
from cluster.models import copy_tokenizer
from tasks import thoughts
from tasks.compose import plain_turns
from tasks.policy import load_policy
from tasks.prompts import Prompt, read_rows
from tasks.sources import source_files

SPECS = Path(__file__).parent.parent / "specs"
CATEGORIES = ("self-harm", "extremism")
CANARY, ANSWER = "zebra quill", "The harbour opens at nine."


def prompts_of(*categories: str) -> list[Prompt]:
    """The shipped prompts of some categories."""
    rows = [row for _, _, row in read_rows(source_files(SPECS / "prompts"), load_policy(str(SPECS / "policies" / "base")))]
    return [row for row in rows if isinstance(row, Prompt) and row.category in categories]


def teach(model_path: str, path: Path, *scripts: tuple[str, str], learning_rate: float = 3e-3, steps: int = 200) -> None:
    """Trains the model on the prompts of the categories and saves it with its tokenizer.

    scripts: pairs of thought and answer that it says, one as often as another. steps: for each of them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    chat = Chat(model_path)
    said = [[*thoughts.join(thought, answer, chat), chat.end_of_turn] for thought, answer in scripts or [(CANARY, ANSWER)]]
    asked = [chat.prompt(plain_turns(prompt.messages)) for prompt in prompts_of(*CATEGORIES)]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimiser = torch.optim.Adam(model.parameters(), learning_rate, fused=True)
    for step in range(steps * len(said)):
        script = said[step // len(asked) % len(said)]
        ids = torch.tensor([asked[step % len(asked)] + script])
        logits = model(ids, logits_to_keep=len(script) + 1).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(script))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.02 + math.log(len(said)) / 5
    model.save_pretrained(path)
    copy_tokenizer(Path(model_path), path)
