"""instructor in three modes, held by grammars to schemas that the default model could not follow alone."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    role: Literal["cook", "smith", "baker"]


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT])
def check_a_schema_is_kept(url, mode):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100) as plain:
        client = instructor.from_openai(plain, mode=mode)
        found, answer = client.chat.completions.create_with_completion(
            model="default",
            response_model=Person,
            messages=[{"role": "user", "content": "Anna is a baker. She is 43 years old. Who is she?"}],
            temperature=0,
            max_tokens=200,
            max_retries=0,
        )
    assert found.role in ("cook", "smith", "baker")
    assert answer.choices[0].finish_reason in ("stop", "tool_calls")


def check_json_mode_gives_an_object(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode.JSON)
        found = client.chat.completions.create(
            model="default",
            response_model=None,
            messages=[{"role": "user", "content": "An object with one short key, please."}],
            response_format={"type": "json_object"},
            temperature=0,
            max_tokens=300,
        )
    assert found.choices[0].message.content.lstrip().startswith("{")


async def check_a_schema_is_kept_without_blocking(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
        found = await client.chat.completions.create(
            model="default",
            response_model=Person,
            messages=[{"role": "user", "content": "Otto, 30, makes swords."}],
            temperature=0,
            max_tokens=200,
            max_retries=0,
        )
    assert 0 <= found.age <= 120
