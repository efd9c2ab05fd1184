"""Talk that we have written ourselves, in English and Chinese: the corpus `talk`. en.yaml and zh.yaml are its texts."""
