"""A chat by LlamaIndex with a bundle that coreinfer-serve serves.

    coreinfer-serve build/demo-bundle
    pip install llama-index-llms-openai-like
    python examples/llamaindex_chat.py "What is a fjord?" "And how is one made?"

Each argument is one turn of the same conversation. OPENAI_BASE_URL and OPENAI_API_KEY name another server.
"""

import os
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from openai import OpenAI

URL = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("OPENAI_API_KEY", "none")


def main(turns: list[str]) -> None:
    """Answer each turn, and write the answer as it comes."""
    with OpenAI(base_url=URL, api_key=KEY) as client:
        name = client.models.list().data[0].id
    chat = OpenAILike(
        model=name, api_base=URL, api_key=KEY, is_chat_model=True, context_window=2048, temperature=0, max_tokens=64
    )
    messages: list[ChatMessage] = []
    for turn in turns:
        messages.append(ChatMessage(role="user", content=turn))
        pieces: list[str] = []
        for chunk in chat.stream_chat(messages):
            pieces.append(chunk.delta or "")
            sys.stdout.write(pieces[-1])
            sys.stdout.flush()
        sys.stdout.write("\n")
        messages.append(ChatMessage(role="assistant", content="".join(pieces)))


if __name__ == "__main__":
    main(sys.argv[1:] or ["What is a fjord?"])
