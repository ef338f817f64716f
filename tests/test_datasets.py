"""The text that ships with the package."""

from importlib.resources import files

from fastdeberta import datasets


def test_wiki_leads():
    articles = datasets.wiki_leads()
    assert len(articles) == 10_033
    topics = {article.topic for article in articles}
    assert len(topics - {"Uncategorized"}) == 11 and len(topics) == 12
    assert sum(article.topic == "Uncategorized" for article in articles) == 1_000
    assert all(article.title and article.text.strip() for article in articles)
    assert datasets.wiki_leads() == articles


def test_its_licence_is_beside_it():
    assert "CC BY-SA 4.0" in (files(datasets) / "WIKI-LEADS-LICENSE.md").read_text()
