"""A chat by LangChain with a bundle that coreinfer-serve serves.

    coreinfer-serve build/demo-bundle
    pip install langchain-openai
    python examples/langchain_chat.py "What is a fjord?" "And how is one made?"

Each argument is one turn of the same conversation. OPENAI_BASE_URL and OPENAI_API_KEY name another server.
"""

import os
import sys

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import SecretStr

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")


def main(turns: list[str]) -> None:
    """Answer each turn, and write the answer as it comes."""
    with OpenAI(base_url=URL, api_key=KEY) as client:
        name = client.models.list().data[0].id
    chat = ChatOpenAI(model=name, base_url=URL, api_key=SecretStr(KEY), temperature=0, max_completion_tokens=64)
    messages: list[BaseMessage] = []
    for turn in turns:
        messages.append(HumanMessage(turn))
        pieces: list[str] = []
        for chunk in chat.stream(messages):
            pieces.append(str(chunk.content))
            sys.stdout.write(pieces[-1])
            sys.stdout.flush()
        sys.stdout.write("\n")
        messages.append(AIMessage("".join(pieces)))


if __name__ == "__main__":
    main(sys.argv[1:] or ["What is a fjord?"])
