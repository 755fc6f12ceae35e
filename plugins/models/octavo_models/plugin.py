"""The plugin ``models``: the model architectures that come with Octavo."""

from __future__ import annotations

from octavo import PluginInfo, Provider, hookimpl

plugin = PluginInfo(api=(1, 1), summary="Model architectures: Llama, Mistral, Qwen2, Qwen3")


@hookimpl
def octavo_models() -> list[Provider]:
    return [
        Provider("LlamaForCausalLM", "octavo_models.llama:LlamaForCausalLM"),
        Provider("MistralForCausalLM", "octavo_models.mistral:MistralForCausalLM"),
        Provider("MinistralForCausalLM", "octavo_models.mistral:MistralForCausalLM"),
        Provider("Qwen2ForCausalLM", "octavo_models.qwen2:Qwen2ForCausalLM"),
        Provider("Qwen3ForCausalLM", "octavo_models.qwen3:Qwen3ForCausalLM"),
    ]
