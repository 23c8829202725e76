"""Names of the files in a bundle."""

from dataclasses import dataclass

__all__ = ["LAYOUT", "Layout"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each part of a bundle lies, relative to the bundle's folder."""

    manifest: str = "manifest.json"
    base: str = "base.safetensors"
    dense: str = "dense.safetensors"
    clusters: str = "clusters"
    tokenizer: str = "tokenizer/tokenizer.json"
    chat_template: str = "tokenizer/chat_template.jinja"
    tool_template: str = "tokenizer/chat_template_tool_use.jinja"
    generation: str = "tokenizer/generation.json"
    token_shares: str = "token_shares.safetensors"
    router_index: str = "router/index.faiss"
    router_tokenizer: str = "router/encoder/tokenizer.json"
    router_table: str = "router/encoder/table.safetensors"
    report: str = "report.html"

    def cluster(self, cluster_id: int) -> str:
        """Name the file of one cluster pack."""
        return f"{self.clusters}/{cluster_id:03d}.safetensors"


LAYOUT = Layout()
