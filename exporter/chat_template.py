"""What a model's chat template makes of chats, told without running a stranger's program in this process."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dispatcher.errors import SourceError
from exporter.limited import CPU_SECONDS, LimitExceeded, ask

MAX_TEMPLATE = 1_000_000
"""Characters; Gemma 4's has 16,000"""


def render(
    template: str, prompts: Sequence[Mapping[str, Any]], *, while_waiting: Callable[[], None] = lambda: None
) -> list[str | None]:
    """Render a Jinja chat template as transformers does, sandboxed and within limits.

    Args:
        template: The template.
        prompts: The variables of each rendering: `messages`, `add_generation_prompt`, the special tokens.
        while_waiting: Called now and then; what it raises ends the work.

    Returns:
        The text of each; None where the template fails or refuses.

    Raises:
        SourceError: `chat_template_too_slow`, `chat_template_too_large`.
    """
    if len(template) > MAX_TEMPLATE:
        raise _too_large(f"has {len(template)} characters, {MAX_TEMPLATE} are the most")
    try:
        answer = ask(
            "exporter.template_run",
            {"template": template, "prompts": [dict(prompt) for prompt in prompts]},
            while_waiting=while_waiting,
        )
    except LimitExceeded as error:
        if error.limit == "memory":
            raise _too_large("takes more memory, or makes longer prompts, than any chat needs") from error
        raise SourceError(
            f"the model's chat template takes longer than {CPU_SECONDS} s for {len(prompts)} short chats, as every "
            "server that loads the model would. Mend the template, or remove it.",
            code="chat_template_too_slow",
        ) from error
    rendered: list[str | None] = answer["rendered"]
    return rendered


def _too_large(what: str) -> SourceError:
    return SourceError(
        f"the model's chat template {what}. Mend the template, or remove it.", code="chat_template_too_large"
    )
