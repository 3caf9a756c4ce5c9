// A report that is written once and comes out twice: as Markdown and as one self-contained HTML
// page. Plots are in the HTML alone.
#pragma once

#include <string>
#include <vector>

#include "base/plot.h"

namespace dsla {

class ReportDocument {
 public:
  void Title(const std::string& text);
  void Section(const std::string& text);
  void Text(const std::string& text);
  // The first row holds the headings; rows may be no longer than it.
  void Table(const std::vector<std::vector<std::string>>& rows);
  void Code(const std::string& text);
  void Plot(const std::vector<PlotSeries>& series, const PlotOptions& options);

  const std::string& markdown() const { return markdown_; }
  std::string html(const std::string& title) const;

 private:
  std::string markdown_, html_;
};

}  // namespace dsla
