"""What requests say, as OpenAI's API has it and besides; whatever is not known here is refused, not ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rwkv_train.command_config import Preset

Effort = Literal["none", "minimal", "low", "medium", "high"]
EFFORTS = {"none": "off", "minimal": "fake", "low": "short", "medium": "normal", "high": "long"}  # keys of THINKING
EFFORT = "How long a model thinks that was taught to; with `minimal` it replies after an empty thought."
MOST_CHOICES, MOST_STOPS, MOST_LIKELIEST = 16, 16, 20


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Part(Strict):
    """A piece of a message. Only text is understood."""

    type: Literal["text", "input_text", "output_text"] = "text"
    text: str
    annotations: list[Any] = Field(default=[], description="As answers have them; not used.")
    logprobs: list[Any] | None = Field(default=None, description="As answers have them; not used.")


def _joined(content: object) -> object:
    """A message's parts as one text."""
    if isinstance(content, list) and content:
        return "".join(Part.model_validate(part).text for part in content)
    return content


Text = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | Annotated[list[Part], Field(min_length=1)])]


class CalledFunction(Strict):
    name: str
    arguments: str = Field(description="A JSON object.")


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="`developer` is taken as `system`.")
    content: Text = Field(description="Its text, or parts of it that are joined.")
    type: Literal["message"] = "message"
    id: str | None = Field(default=None, description="As answers have it; not used.")
    status: str | None = Field(default=None, description="As answers have it; not used.")

    def plain(self) -> dict:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ChatMessage(Message):
    """One message of a chat, perhaps one that calls functions, or what a function gave."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="`developer` is taken as `system`."
    )
    content: Text | None = Field(default=None, description="Its text, or parts that are joined; null beside calls.")
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1)
    tool_call_id: str | None = Field(default=None, description="As calls have it; not used: results follow the calls.")
    reasoning_content: str | None = Field(default=None, description="As answers have it; not used.")
    refusal: str | None = Field(default=None, description="As answers have it; not used.")

    @model_validator(mode="after")
    def _says_something(self) -> "ChatMessage":
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls are the assistant's alone")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; only a message with tool_calls may be without")
        return self

    def plain(self) -> dict:
        called = {"tool_calls": [call.model_dump() for call in self.tool_calls]} if self.tool_calls else {}
        return super().plain() | called


class Function(Strict):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema.")
    strict: bool | None = Field(default=None, description="Not used: arguments are as the model writes them.")


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def plain(self) -> dict:
        return {"function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class Format(Strict):
    """How a reply has to be written."""

    type: Literal["text", "json_object"]


class NamedSchema(Strict):
    name: str = Field(max_length=64)
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema.")
    strict: bool | None = Field(default=None, description="The reply always follows the schema, whatever this says.")
    description: str | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class FlatSchemaFormat(NamedSchema):
    type: Literal["json_schema"]


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=200)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(_listed, json_schema_input_type=str | Annotated[list[str], Field(max_length=MOST_STOPS)]),
]


class TextRequest(Strict):
    """What requests for text have in common."""

    model: str | None = Field(default=None, description="A name of `/v1/models`; the first one if not given.")
    stream: bool = Field(default=False, description="Send server-sent events, each when it is there.")
    preset: Preset | None = Field(
        default=None, description="Values by name of what else is not given here; the server's own if not given."
    )
    temperature: float | None = Field(default=None, ge=0, le=100, description="0 always takes the likeliest token.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="0 always takes the likeliest token.")
    top_k: int | None = Field(
        default=None, ge=0, description="Sample from this many of the likeliest tokens; 0 is all."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Leave out tokens less likely than the likeliest one times this."
    )
    presence_penalty: float | None = Field(default=None, ge=-100, le=100)
    frequency_penalty: float | None = Field(default=None, ge=-100, le=100)
    penalty_decay: float | None = Field(
        default=None, ge=0, le=1, description="What `frequency_penalty` counts shrinks by this factor with each token."
    )
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="The same seed and request give the same reply; else by chance.",
    )
    stop: Stop | None = Field(default=None, description="Texts before which the reply ends, in place of the server's.")
    user: str | None = Field(default=None, description="Not used: who you are is told by the token.")


class StreamOptions(Strict):
    include_usage: bool = Field(default=False, description="A last event has the number of tokens.")


class ChatRequest(TextRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[Tool] | None = Field(default=None, max_length=128, description="Functions that the reply may call.")
    tool_choice: Literal["auto", "none"] | None = Field(default=None, description="`none` does not name the tools.")
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    logprobs: bool | None = Field(default=None, description="Log probabilities by the model, at temperature 1.")
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LIKELIEST)
    response_format: Annotated[Format | SchemaFormat, Field(discriminator="type")] | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: Effort | None = Field(default=None, description=EFFORT)
    store: bool | None = Field(
        default=None, description="Whether the state after the reply is kept; it is if not given."
    )
    metadata: dict[str, str] | None = None


class CompletionRequest(TextRequest):
    prompt: Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)] | str = Field(
        description="Text to continue, or several; each begins a document."
    )
    max_tokens: int = Field(default=16, ge=1)
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LIKELIEST)
    echo: bool = Field(default=False, description="The answer begins with the prompt.")
    stream_options: StreamOptions | None = None


class TextSettings(Strict):
    format: Annotated[Format | FlatSchemaFormat, Field(discriminator="type")] | None = None


class Reasoning(Strict):
    effort: Effort | None = Field(default=None, description=EFFORT)


class ResponseRequest(TextRequest):
    input: str | Annotated[list[Message], Field(min_length=1)]
    instructions: str | None = Field(default=None, description="A system message before the input.")
    previous_response_id: str | None = Field(
        default=None, description="The reply that this follows: its state is gone on from, and nothing is read twice."
    )
    max_output_tokens: int | None = Field(default=None, ge=1)
    reasoning: Reasoning | None = None
    text: TextSettings | None = None
    store: bool | None = Field(default=None, description="Whether the reply is kept; it is if not given.")
    metadata: dict[str, str] | None = None


class FeedbackRequest(Strict):
    """A correction. `answer`: with `response_id` it corrects that reply in its dialogue, with `question` it teaches.
    `good`, `bad`: of `response_id`. `also`: `question` is another way to ask correction `of`. `keep`: `question` keeps
    the answer it had before correction `of`."""

    kind: Literal["answer", "good", "bad", "also", "keep"]
    model: str | None = Field(default=None, description="The profile that is taught; the first one if not given.")
    response_id: str | None = None
    question: str | None = None
    answer: str | None = None
    of: int | None = Field(default=None, ge=1, description="A correction's number; the newest if not given.")
