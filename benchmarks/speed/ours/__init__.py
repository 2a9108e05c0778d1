"""Parts of catsdogs measured alone, without Ray."""
