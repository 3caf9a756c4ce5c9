#include "base/report_document.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/check.h"

namespace dsla {

void ReportDocument::Title(const std::string& text) {
  markdown_ += "# " + text + "\n\n";
  html_ += "<h1>" + EscapeHtml(text) + "</h1>\n";
}

void ReportDocument::Section(const std::string& text) {
  markdown_ += "## " + text + "\n\n";
  html_ += "<h2>" + EscapeHtml(text) + "</h2>\n";
}

void ReportDocument::Text(const std::string& text) {
  markdown_ += text + "\n\n";
  html_ += "<p>" + EscapeHtml(text) + "</p>\n";
}

void ReportDocument::Table(const std::vector<std::vector<std::string>>& rows) {
  DSLA_CHECK(!rows.empty());
  // Cells are padded, so that the Markdown is a table on a terminal too.
  std::vector<size_t> widths(rows[0].size(), 3);
  for (const auto& row : rows) {
    DSLA_CHECK(row.size() <= widths.size());
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], row[c].size());
  }
  html_ += "<table>\n";
  for (size_t i = 0; i < rows.size(); ++i) {
    html_ += "<tr>";
    markdown_ += "|";
    for (size_t c = 0; c < rows[i].size(); ++c) {
      markdown_ += c == 0 ? fmt::format(" {:<{}} |", rows[i][c], widths[c])
                          : fmt::format(" {:>{}} |", rows[i][c], widths[c]);
      html_ += fmt::format("<{0}>{1}</{0}>", i == 0 ? "th" : "td", EscapeHtml(rows[i][c]));
    }
    markdown_ += "\n";
    html_ += "</tr>\n";
    if (i > 0) continue;
    markdown_ += "|";
    for (size_t c = 0; c < widths.size(); ++c)
      markdown_ += fmt::format(" {:-<{}}{}", "", widths[c] - 1, c == 0 ? "- |" : ": |");
    markdown_ += "\n";
  }
  markdown_ += "\n";
  html_ += "</table>\n";
}

void ReportDocument::Code(const std::string& text) {
  markdown_ += "```\n" + text + "```\n\n";
  html_ += "<pre>" + EscapeHtml(text) + "</pre>\n";
}

void ReportDocument::Plot(const std::vector<PlotSeries>& series, const PlotOptions& options) {
  html_ += LinePlot(series, options);
}

std::string ReportDocument::html(const std::string& title) const {
  return "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>" +
         EscapeHtml(title) +
         "</title>\n<style>body{font:15px sans-serif;max-width:900px;margin:2em auto;padding:0 "
         "1em}table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid "
         "#ccc;padding:3px 10px;text-align:right}pre{background:#f5f5f5;padding:1em;overflow:"
         "auto}svg{display:block;margin:1em "
         "0;max-width:100%;height:auto}</style></head><body>\n" +
         html_ + "</body></html>\n";
}

}  // namespace dsla
