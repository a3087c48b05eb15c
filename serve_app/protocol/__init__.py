"""Requests and responses of the API: OpenAI's, Anthropic's, vLLM's and `/prompt`'s schemas.

Read `call.py` first: it defines the call and the reply of every endpoint. Then read `fields.py`
(validation of a body) and `chat.py` (one request with its response). The other modules, by subject:

    routes          completions, prompt, tokens, batch; responses_api/ and messages_api/ translate
                    the newer APIs of OpenAI and Anthropic to chat
    bodies          field_types, field_errors, values; unsupported has the fields without effect
    conversations   messages, content_parts, conversation; chat_template renders them as a prompt
    token ids       tokenizer, with tokenizer_files and sentencepiece_model; control_tokens keeps
                    users' text from becoming control tokens
    answers         text, with detokenizer (token ids to text) and stop (stop strings); scores (log
                    probabilities), echo, choices (several answers), response (common fields)
    tools           tools, tool_request (the request's fields), tool_prompt (in the prompt),
                    tool_grammar, tool_calls (in the answer)
    grammars        grammar_source (the request's fields), grammar (compiles them), grammar_rules,
                    grammar_numbers (refuses some numbers), grammar_trial (limits time and
                    memory), large_stack, unnamed_tokens; schema_tree, one_of,
                    neutral_keywords and exact_keywords rewrite JSON schemas
    streams         sse (server-sent events), json_pieces (large JSON values)
    headers         header_names; cors (what pages of other origins may do)
    users           key_account and allowance (limits of an API key), session (the replica of a
                    conversation)
"""
